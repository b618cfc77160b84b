"""
kill -9 of the server, of Envoy and of the client while an agent runs: nothing opens, things come back.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clawker_cp.testing.machine import Machine, outcome

ENVOY_TOO = 0.3  # how often Envoy is killed a moment before the server
KILL_ENVOY = "kill -9 $(sed 's/[^0-9]*\\([0-9]*\\).*/\\1/' {mark})"
KILLS = int(os.environ.get("CLAWKER_TEST_KILLS", "5"))
MOMENTS = int(os.environ.get("CLAWKER_TEST_MOMENTS", "4"))
pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(120 + 20 * KILLS),
]


# Tries what is denied all the time, and what is allowed now and then; ends when the file appears.
LOOP = """
import os, socket, subprocess, time
opened = 0
while not os.path.exists("stop"):
    for address in (("203.0.113.66", 6379), ("198.51.100.10", 22)):
        s = socket.socket(); s.settimeout(0.5)
        try:
            s.connect(address); print("OPENED", address, flush=True); opened += 1
        except OSError: pass
        s.close()
    try: socket.getaddrinfo("evil.example.org", 443); print("RESOLVED", flush=True)
    except OSError: pass
    time.sleep(0.01)
page = ""
until = time.monotonic() + 20
while not page and time.monotonic() < until:
    curl = ["curl", "-sS", "-m", "5", "https://www.example.com/echo"]
    page = subprocess.run(curl, capture_output=True, text=True).stdout
print("AFTER", "www.example.com" in page, flush=True)
raise SystemExit(9)
"""


def envoy_mark(machine: Machine) -> Path:
    return machine.host.directory / "data" / "firewall" / "envoy.pid"


async def server_pid(machine: Machine) -> int:
    done = await machine.host.run(["cat", "/run/clawker/cp.pid"])
    return int(done.out.strip() or 0)


async def wait_for(
    machine: Machine, condition: str, client: asyncio.subprocess.Process | None = None, limit_s: float = 20
) -> None:
    """Wait until a shell condition holds in the machine; fail at once if the client ends before."""
    until = time.monotonic() + limit_s
    while (await machine.host.run(["sh", "-c", condition])).code != 0:
        if client is not None and client.returncode is not None:
            tail = (machine.host.directory / "run.err").read_text()[-2000:]
            raise AssertionError(f"the client ended with {client.returncode}: {tail}")
        log = machine.host.directory / "state" / "logs" / "server.out"
        assert time.monotonic() < until, f"{condition}: {log.read_text()[-2000:]}"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("options", [[], ["--allow-root", "--user", "0"]], ids=["user", "root"])
async def test_killing_the_server_opens_nothing_and_the_next_one_adopts(machine: Machine, options: list[str]) -> None:
    """Through many kills of the server and of Envoy nothing denied opens; then new names work, the code arrives."""
    argv = machine.argv(
        "--allow", "https://www.example.com", "--allow", "tcp://db.example.com:5432", *options,
        command=["/usr/bin/python3", "-c", LOOP],
    )  # fmt: skip
    out, err = machine.host.directory / "run.out", machine.host.directory / "run.err"
    chance = random.Random(7)
    killed = [0]
    # Files, not pipes: the client writes all the time, and nobody reads while servers are being killed.
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = await machine.host.start(
            argv, env=machine.environment, stdin=asyncio.subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )
        try:
            for _ in range(KILLS):
                last = killed[-1]  # its number may be that of a zombie, and numbers begin again
                known = "$(cat /run/clawker/cp.pid)"
                await wait_for(machine, f'test -n "{known}" && test "{known}" != {last} && kill -0 "{known}"', process)
                await asyncio.sleep(chance.uniform(0.3, 1.5))
                pid = await server_pid(machine)
                killed.append(pid)
                if chance.random() < ENVOY_TOO:
                    await machine.host.run(["sh", "-c", KILL_ENVOY.format(mark=envoy_mark(machine))])
                await machine.host.run(["kill", "-9", str(pid)])
            (machine.workdir / "stop").touch()
            async with asyncio.timeout(60):
                await process.wait()
        finally:
            (machine.workdir / "stop").unlink(missing_ok=True)
            if process.returncode is None:
                process.kill()
                await process.wait()
    done = outcome(process.returncode or 0, out.read_text(), err.read_text())

    assert "OPENED" not in done.out and "RESOLVED" not in done.out
    assert "AFTER True" in done.out, done.err[-1500:]
    assert done.code == 9, done.err[-1500:]
    assert len(killed) == KILLS + 1


async def kill_server(machine: Machine, how: str = "KILL") -> None:
    await machine.host.run(["sh", "-c", f"kill -{how} $(cat /run/clawker/cp.pid)"])


@asynccontextmanager
async def one_run(machine: Machine) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command that is to run once and to end with 9, and what came of it."""
    ran, pipe = machine.workdir / "ran", asyncio.subprocess.PIPE
    command = ["/bin/sh", "-c", "echo once >> ran; sleep 0.5; echo said; exit 9"]
    argv = machine.argv("--allow", "https://www.example.com", command=command)
    process = await machine.host.start(
        argv, env=machine.environment, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    try:
        yield process
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        told = ran.read_text() if ran.exists() else ""
    finally:
        ran.unlink(missing_ok=True)
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (told, out.decode(), process.returncode) == ("once\n", "said\n", 9), err.decode()[-1500:]


@pytest.mark.parametrize("seed", range(MOMENTS))
async def test_a_server_killed_while_it_starts_a_command_neither_loses_nor_repeats_it(
    machine: Machine, seed: int
) -> None:
    """Killed twice at any moment from its first: the command runs once, its output and its code arrive."""
    chance = random.Random(seed)
    async with one_run(machine):
        for _ in range(2):
            await asyncio.sleep(chance.uniform(0.2, 1.6))
            await kill_server(machine)


@pytest.mark.parametrize("seed", range(MOMENTS))
@pytest.mark.parametrize("how", ["KILL", "TERM"])
async def test_a_server_killed_while_a_command_ends_tells_its_code(machine: Machine, seed: int, how: str) -> None:
    """Whether it was taken apart, half or not at all, and killed again by then: the code arrives."""
    chance = random.Random(seed)
    async with one_run(machine) as process:
        await wait_for(machine, f"test -e {machine.workdir}/ran")
        await asyncio.sleep(chance.uniform(0.45, 0.85))
        known = await server_pid(machine)
        await kill_server(machine, how)
        again = f'test "$(cat /run/clawker/cp.pid)" != {known}'
        while process.returncode is None and (await machine.host.run(["sh", "-c", again])).code:
            await asyncio.sleep(0.02)
        await asyncio.sleep(chance.uniform(0.0, 1.2))
        await kill_server(machine, how)


@pytest.mark.parametrize("seed", range(MOMENTS))
async def test_envoy_killed_while_a_command_starts_is_no_reason_to_refuse_it(machine: Machine, seed: int) -> None:
    """It comes back with the rules it had or was being given; the command runs all the same."""
    chance = random.Random(seed)
    async with one_run(machine):
        await asyncio.sleep(chance.uniform(0.4, 2.0))
        await machine.host.run(["sh", "-c", KILL_ENVOY.format(mark=envoy_mark(machine))])


async def test_killing_envoy_opens_nothing_and_it_comes_back(machine: Machine) -> None:
    """After kill -9 of Envoy an allowed request works again within ten seconds and a denied one stays denied."""
    code = """
import subprocess, time
def page(url): return subprocess.run(["curl", "-sS", "-m", "3", url], capture_output=True, text=True).stdout
print("BEFORE", "api.example.com" in page("https://api.example.com/echo"), flush=True)
open("ready", "w").close()
import os
while not os.path.exists("killed"): time.sleep(0.01)
until = time.monotonic() + 10
while "api.example.com" not in page("https://api.example.com/echo") and time.monotonic() < until: pass
print("AFTER", time.monotonic() < until, "evil" in page("https://evil.example.org/echo"), flush=True)
"""
    argv = machine.argv("--allow", "https://api.example.com", command=["/usr/bin/python3", "-c", code])
    pipe = asyncio.subprocess.PIPE
    process = await machine.host.start(argv, env=machine.environment, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        until = time.monotonic() + 30
        while not (machine.workdir / "ready").exists():
            assert time.monotonic() < until
            await asyncio.sleep(0.05)
        await machine.host.run(["sh", "-c", KILL_ENVOY.format(mark=envoy_mark(machine))])
        (machine.workdir / "killed").touch()
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        for name in ("ready", "killed"):
            (machine.workdir / name).unlink(missing_ok=True)
        if process.returncode is None:
            process.kill()
            await process.wait()

    assert "BEFORE True" in out.decode(), err.decode()[-1500:]
    assert "AFTER True False" in out.decode(), err.decode()[-1500:]


async def test_killing_the_client_ends_its_sandbox(machine: Machine) -> None:
    """A sandbox whose client was killed is ended, and with the last one everything is gone."""
    argv = machine.argv(command=["sleep", "1000"])
    process = await machine.host.start(argv, env=machine.environment, stdin=asyncio.subprocess.DEVNULL)
    await wait_for(machine, "pgrep -x sleep -a | grep -q 1000")
    process.kill()  # every stage between us and the client is an exec: this is the client
    await process.wait()
    await wait_for(machine, "! ip link show clawker0 2>/dev/null && ! ls /sys/fs/bpf/clawker 2>/dev/null", limit_s=40)

    assert (await machine.host.run(["ip", "netns", "list"])).out.strip() == ""


async def test_a_server_whose_client_was_killed_before_it_came_ends(machine: Machine) -> None:
    """Nobody came that could go: after a time it ends as it does behind the last sandbox, and leaves nothing."""
    process = await machine.host.start(
        machine.argv(command=["true"]), env=machine.environment, stdin=asyncio.subprocess.DEVNULL
    )
    await wait_for(machine, "ls /sys/fs/bpf/clawker")  # long before it is ready
    process.kill()
    await process.wait()
    known = await server_pid(machine)
    await wait_for(machine, f"! kill -0 {known}", limit_s=60)

    state = machine.host.directory / "state" / "sandboxes"
    places = f"ip link show clawker0; ls /sys/fs/bpf/clawker; ip netns list; nft list tables; ls {state}"
    left = await machine.host.run(["sh", "-c", places])
    assert left.out.strip() == "", left.out
