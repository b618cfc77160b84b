"""Finding a server, starting one, and how long a client goes on trying; the servers are small programs that obey."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from clawker_cp.cli import joining
from clawker_cp.cli.joining import ServerRefused, join_server, socket_path
from clawker_cp.config import Directories
from clawker_cp.errors import DeadlineExceeded, Unavailable

# Does what the next line of `plan` says: dies, refuses with a code, or serves.
SERVER = """#!{python}
import json, os, signal, socket, sys
root = {root!r}
fd = int(sys.argv[sys.argv.index("--ready-fd") + 1])
lines = open(root + "/plan").read().split()
open(root + "/plan", "w").write(" ".join(lines[1:]))
with open(root + "/started", "a") as file:
    file.write(str(os.getpid()) + " ")
what = lines[0] if lines else "die"
if what == "serve":
    path = root + "/state/run.sock"
    if os.path.exists(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    os.write(fd, json.dumps({{"ready": True}}).encode() + b"\\n")
    signal.alarm(20)
    kept = []
    while True:
        kept.append(sock.accept())
elif what != "die":
    os.write(fd, json.dumps({{"ready": False, "message": "cannot", "code": what, "hint": "do this"}}).encode() + b"\\n")
"""


class Place:
    """Directories of a host without a server, and the plan of those that will be started."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.directories = Directories(config=root, data=root, state=root / "state", cache=root)
        program = root / "python"
        program.write_text(SERVER.format(python=sys.executable, root=str(root)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))

    def plan(self, *steps: str) -> None:
        (self.root / "plan").write_text(" ".join(steps))

    @property
    def started(self) -> list[int]:
        file = self.root / "started"
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


async def joined(place: Place, **options: object) -> None:
    """Join, and end the server that was found."""
    channel = await join_server(place.directories, (0, 1, 2), **options)  # type: ignore[arg-type]
    await channel.aclose()
    await end(place.started[-1])


async def end(pid: int) -> None:
    """Kill a server, and wait until its socket is closed."""
    os.kill(pid, signal.SIGKILL)
    await wait_gone(pid)


async def wait_gone(pid: int) -> None:
    """Wait until a process has ended; its own parent may not have collected it yet."""
    async with asyncio.timeout(5):
        while is_alive(pid):
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_no_server_is_started_and_one_that_is_there_is_joined(place: Place) -> None:
    """The first client starts it, the second finds it, also when another one was just faster."""
    place.plan("serve")
    channel = await join_server(place.directories, (0, 1, 2))
    again = await join_server(place.directories, (0, 1, 2))
    assert len(place.started) == 1
    await channel.aclose()
    await again.aclose()
    await end(place.started[-1])
    place.plan("ALREADY_RUNNING", "die", "serve")
    await joined(place)
    assert len(place.started) == 4


async def test_a_refusal_is_told_at_once(place: Place) -> None:
    """A server that says why it cannot start is believed: its message, code and hint are the error."""
    place.plan("PORT_TAKEN", "serve")
    with pytest.raises(ServerRefused, match="cannot") as caught:
        await joined(place)
    assert (caught.value.code, caught.value.hint, len(place.started)) == ("PORT_TAKEN", "do this", 1)


async def test_servers_that_die_are_given_up_in_the_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some attempts the error names the socket and where to look."""
    monkeypatch.setattr(joining, "ATTEMPTS", 3)
    monkeypatch.setattr(joining, "DIED_PATIENCE_S", 0.0)
    place.plan()
    with pytest.raises(Unavailable, match=str(socket_path(place.directories))) as caught:
        await joined(place)
    assert len(place.started) == 3
    assert "clawker-controlplane.log" in (caught.value.hint or "")


async def test_deaths_are_outlasted_for_a_while(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """More servers that are killed while they start than attempts: the one that lives is joined."""
    monkeypatch.setattr(joining, "ATTEMPTS", 2)
    monkeypatch.setattr(joining, "RETRY_MAX_S", 0.05)
    place.plan(*["die"] * 5, "serve")
    await joined(place)
    assert len(place.started) == 6


async def test_patience_outlasts_refusals_and_deaths(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a command to come back to, refusals and deaths are told once each and waited out."""
    monkeypatch.setattr(joining, "RETRY_MAX_S", 0.05)
    place.plan(*["die"] * 12, "PORT_TAKEN", "PORT_TAKEN", "serve")
    told: list[str] = []
    await joined(place, patience_s=60.0, tell=told.append)
    assert len(place.started) == 15
    assert told == ["the server ended before it was ready", "cannot"]


async def test_patience_ends(place: Place) -> None:
    """When it is used up the last refusal is the error."""
    place.plan(*["PORT_TAKEN"] * 100)
    with pytest.raises(ServerRefused):
        await joined(place, patience_s=0.3)
    assert len(place.started) > 1


async def test_a_server_that_says_nothing_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not ready in time is terminated, and the error says how long was waited."""
    monkeypatch.setattr(joining, "START_TIMEOUT_S", 0.2)
    program = Path(sys.executable)
    program.write_text(f"#!/bin/sh\necho $$ > {place.root}/started\nexec sleep 30\n")
    with pytest.raises(DeadlineExceeded, match="ready within"):
        await joined(place)
    await wait_gone(place.started[0])
