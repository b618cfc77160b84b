"""
Finding the server of this host, or starting one that lives as long as its sandboxes.

`clawker-cp run` is always a client (ruling R26). The server it starts is a process of its own, so
that neither the end nor the death of a client touches enforcement. Called by `cli.run`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import orjson

from clawker_cp.config import Directories
from clawker_cp.errors import ClawkerError, DeadlineExceeded, Unavailable
from clawker_cp.rpc.local_protocol import SOCKET_NAME, LocalChannel, connect

CONNECT_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
ATTEMPTS = 10
DIED = "SERVER_DIED"


class ServerRefused(Unavailable):
    """A server we started ended before it was ready; the message is its own."""


def socket_path(directories: Directories) -> Path:
    """
    Where the server of this host listens for `run`.
    """
    return directories.state / SOCKET_NAME


async def join_server(directories: Directories, streams: tuple[int, int, int]) -> LocalChannel:
    """
    Connect to the server of this host, starting one first if there is none.

    A server that is just going away, or another client that starts one at the same moment, is
    waited for and tried again. Raises `ServerRefused` with the server's own error.
    """
    path = socket_path(directories)
    refusal: ClawkerError | None = None
    for _attempt in range(ATTEMPTS):
        try:
            return await connect(path, streams, CONNECT_TIMEOUT_S)
        except (FileNotFoundError, ConnectionRefusedError):
            try:
                await _start_server(directories)
            except ServerRefused as error:
                if error.code not in {"ALREADY_RUNNING", DIED}:
                    raise
                refusal = error
    raise Unavailable(
        f"no server answers at {path}" + (f": {refusal}" if refusal else ""),
        hint="look at the server's log with: tail " + str(directories.state / "logs" / "clawker-controlplane.log"),
    )


async def _start_server(directories: Directories) -> None:
    """
    Start a server of our own, detached, and wait until it says that it is ready.
    """
    logs = directories.state / "logs"
    logs.mkdir(parents=True, exist_ok=True, mode=0o750)
    ready_read, ready_write = os.pipe()
    try:
        with (logs / "server.out").open("ab") as output:
            server = subprocess.Popen(  # noqa: ASYNC220 - fork and exec of our own interpreter, nothing is waited for
                [sys.executable, "-m", "clawker_cp", "serve", "--ephemeral", "--ready-fd", str(ready_write)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[ready_write],
                start_new_session=True,
                cwd="/",
            )
    finally:
        os.close(ready_write)
    try:
        reader = asyncio.StreamReader()
        pipe = os.fdopen(ready_read, "rb")
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await reader.readline()
        except TimeoutError as error:
            server.terminate()
            raise DeadlineExceeded(f"the server was not ready within {START_TIMEOUT_S:.0f} s") from error
        finally:
            transport.close()
    finally:
        # The server outlives us; only its early death is ours to collect.
        server.poll()
        server.returncode = server.returncode if server.returncode is not None else 0
    if not line:
        raise ServerRefused(
            "the server ended before it was ready", code=DIED, hint=f"its output is in {logs / 'server.out'}"
        )
    answer = orjson.loads(line)
    if not answer.get("ready"):
        raise ServerRefused(answer.get("message", "unknown"), code=answer.get("code"), hint=answer.get("hint"))
