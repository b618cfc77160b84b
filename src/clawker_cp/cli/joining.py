"""
Finding the server of this host, or starting one that lives as long as its sandboxes.

`clawker-cp run` is always a client (ruling R26). The server it starts is a process of its own, so
that neither the end nor the death of a client touches enforcement. Called by `cli.run`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson

from clawker_cp.config import Directories
from clawker_cp.errors import ClawkerError, DeadlineExceeded, Unavailable
from clawker_cp.rpc.local_protocol import SOCKET_NAME, LocalChannel, connect

CONNECT_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
ATTEMPTS = 10
DIED_PATIENCE_S = 60.0  # servers that were killed while they started: another may live, one that always dies does not
RETRY_MIN_S, RETRY_MAX_S = 0.05, 2.0
DIED = "SERVER_DIED"
PASSING = {"ALREADY_RUNNING", DIED}
PASSING_ERRORS = (ConnectionError, FileNotFoundError, TimeoutError)


class ServerRefused(Unavailable):
    """A server we started ended before it was ready; the message is its own."""


def socket_path(directories: Directories) -> Path:
    """
    Where the server of this host listens for `run`.
    """
    return directories.state / SOCKET_NAME


async def join_server(
    directories: Directories,
    streams: tuple[int, int, int],
    *,
    patience_s: float = 0.0,
    tell: Callable[[str], None] = lambda _why: None,
) -> LocalChannel:
    """
    Connect to the server of this host, starting one first if there is none.

    A server that is just going away, or another client that starts one at the same moment, is
    waited for and tried again. Raises `ServerRefused` with the server's own error, at once unless
    there is patience: then whatever stands in the way is told, each new cause once, and tried
    again, more and more slowly, until it is used up. A command that runs is worth waiting for.
    """
    path = socket_path(directories)
    began = time.monotonic()
    until, died_until = began + patience_s, began + DIED_PATIENCE_S
    delay_s, told = RETRY_MIN_S, ""
    for attempt in itertools.count(1):
        try:
            return await _connect_or_start(directories, path, streams)
        except (ClawkerError, OSError) as error:
            passing = _passes(error)
            died = isinstance(error, ServerRefused) and error.code == DIED
            more = attempt < ATTEMPTS or (died and time.monotonic() < died_until)
            if time.monotonic() >= until and not (passing and more):
                if not passing:
                    raise
                raise Unavailable(
                    f"no server answers at {path}: {error}",
                    hint=f"look at the server's log with: tail {directories.logs / 'clawker-controlplane.log'}",
                ) from error
            if patience_s and str(error) != told:
                told = str(error)
                tell(told)
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, RETRY_MAX_S)
    raise AssertionError


def _passes(error: ClawkerError | OSError) -> bool:
    """Whether another attempt may not meet this."""
    if isinstance(error, ClawkerError):
        return error.code in PASSING
    return isinstance(error, PASSING_ERRORS)


async def _connect_or_start(directories: Directories, path: Path, streams: tuple[int, int, int]) -> LocalChannel:
    try:
        return await connect(path, streams, CONNECT_TIMEOUT_S)
    except (FileNotFoundError, ConnectionRefusedError):
        await _start_server(directories)
    return await connect(path, streams, CONNECT_TIMEOUT_S)


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
