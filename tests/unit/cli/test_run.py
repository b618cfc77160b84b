"""The client of one run, against servers that die at given moments."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.cli import run
from clawker_cp.cli.run import Output, RunClient
from clawker_cp.config import Directories
from clawker_cp.rpc.local_protocol import SANDBOX_GONE, LocalChannel, connect, receive_streams

LIMIT_S = 10.0
ASKED = {"op": "run", "tty": False}
ATTACH = {"op": "attach", "id": "one"}
CREATED = {"event": "created", "id": "one"}
STARTED = {"event": "started"}
GONE = {"event": "error", "code": SANDBOX_GONE, "message": "gone"}
END = {"event": "exit", "code": 9}
HEARS = {"hears": 1}  # what a server does not say: it waits for a message of the client


class Servers:
    """One after the other at one socket: each takes a request, says its lines and dies."""

    def __init__(self, *lives: tuple[Mapping[str, Any], ...]) -> None:
        self._lives = lives
        self.heard: list[Mapping[str, Any] | None] = []

    async def serve(self, listener: socket.socket) -> None:
        for lines in self._lives:
            sock, _address = await asyncio.get_running_loop().sock_accept(listener)
            for fd in await receive_streams(sock, LIMIT_S):
                os.close(fd)
            channel = await LocalChannel.over(sock)
            self.heard.append(await channel.receive())
            for line in lines:
                if line is HEARS:
                    self.heard.append(await channel.receive())
                else:
                    await channel.send(dict(line))
            await channel.aclose()


@asynccontextmanager
async def client_of(servers: Servers, directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunClient]:
    path = directory / "run.sock"

    async def join(_directories: Directories, streams: tuple[int, int, int], **_options: object) -> LocalChannel:
        return await connect(path, streams, LIMIT_S)

    monkeypatch.setattr(run, "join_server", join)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            group.create_task(servers.serve(listener))
            output = Output(as_json=False, quiet=True, verbose=False, learn_to=None)
            yield RunClient(Directories.from_environment({}), dict(ASKED), output)


@pytest.mark.parametrize(
    ("lives", "heard"),
    [
        ([(), (CREATED, STARTED, END)], [ASKED, ASKED]),
        ([(CREATED,), (GONE,), (CREATED, STARTED, END)], [ASKED, ATTACH, ASKED]),
        ([(CREATED,), (STARTED, END)], [ASKED, ATTACH]),
        ([(CREATED, STARTED), (STARTED,), (END,)], [ASKED, ATTACH, ATTACH]),
    ],
    ids=["before it was made", "before it ran", "before it was told that it ran", "while it ran"],
)
async def test_a_command_runs_once_whenever_servers_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: list[tuple[Mapping[str, Any], ...]], heard: list[Any]
) -> None:
    """It is asked for again only if it never began; then it is attached to, and its own code is the end."""
    servers = Servers(*lives)
    async with client_of(servers, tmp_path, monkeypatch) as client:
        code = await client.run()
    assert (code, servers.heard) == (9, heard)


async def test_a_signal_while_no_server_is_there_is_told_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept until a server says that the command runs, also one that is the first to say so."""
    servers = Servers((CREATED,), (STARTED, HEARS, END))
    async with client_of(servers, tmp_path, monkeypatch) as client:
        monkeypatch.setattr(client, "_lost", lambda: os.kill(os.getpid(), signal.SIGUSR1))
        code = await client.run()
    assert (code, servers.heard) == (9, [ASKED, ATTACH, {"op": "signal", "signo": signal.SIGUSR1}])
