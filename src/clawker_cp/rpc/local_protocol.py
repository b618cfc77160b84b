"""
What `clawker-cp run` and the server on this host say to each other over a UNIX socket.

One connection is one sandbox. The client first sends one byte with its three standard streams
attached (SCM_RIGHTS), then JSON objects, one a line, each with an `op`; the server answers with
JSON objects, each with an `event`. Both sides bound a line, and the server accepts only root and
its own user. Framing and connecting live here; meaning in `local_server` and `cli.run`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path
from typing import Any

import orjson

from clawker_cp.errors import InvalidInput, Unavailable

SOCKET_NAME = "run.sock"
SANDBOX_GONE = "SANDBOX_GONE"  # code of an `error`: nothing is known of the sandbox to attach to
LINE_LIMIT_BYTES = 4 * 1024 * 1024
STREAMS = 3
_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid


class LocalChannel:
    """
    One side of a connection: JSON objects in both directions.

    `receive` returns None at the end of the stream and raises `InvalidInput` for a line that is
    too long or no JSON object. `send` waits while the peer does not read.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> LocalChannel:
        """
        Take over a connected socket whose attached streams were already sent or received.
        """
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=LINE_LIMIT_BYTES)
        return cls(reader, writer)

    async def receive(self) -> dict[str, Any] | None:
        try:
            line = await self._reader.readline()
        except ValueError as error:
            raise InvalidInput(f"message longer than {LINE_LIMIT_BYTES} bytes on the local socket") from error
        except ConnectionError:
            return None
        if not line.endswith(b"\n"):
            return None
        try:
            message = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise InvalidInput("message on the local socket is not JSON") from error
        if not isinstance(message, dict):
            raise InvalidInput("message on the local socket is not a JSON object")
        return message

    async def send(self, message: dict[str, Any]) -> None:
        try:
            line = orjson.dumps(message)
        except TypeError as error:  # a directory or a variable of the environment, for the arguments are looked at
            raise InvalidInput(f"what is asked for cannot be sent: {error}") from error
        try:
            self._writer.write(line + b"\n")
            await self._writer.drain()
        except (ConnectionError, RuntimeError) as error:  # uvloop: writing to a closed transport is the latter
            raise Unavailable("the other side of the local socket went away") from error

    async def aclose(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(1):
                await self._writer.wait_closed()
        except (TimeoutError, OSError):
            return


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """
    Pid, uid and gid of the process at the other end, as the kernel attests them.
    """
    return _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))


async def connect(path: Path, streams: tuple[int, int, int], timeout_s: float) -> LocalChannel:
    """
    Connect to the server at `path`, handing it `streams`.

    Raises `FileNotFoundError` or `ConnectionRefusedError` when no server is there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(sock, str(path))
        socket.send_fds(sock, [b"\0"], list(streams))
        return await LocalChannel.over(sock)
    except BaseException:
        sock.close()
        raise


async def receive_streams(sock: socket.socket, timeout_s: float) -> tuple[int, int, int]:
    """
    Take the three streams that a client attaches to its first byte; the caller closes them.

    Raises `InvalidInput` when there are not exactly three.
    """
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def on_readable() -> None:
        loop.remove_reader(sock.fileno())
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(sock.fileno(), on_readable)
    try:
        async with asyncio.timeout(timeout_s):
            await readable
    finally:
        loop.remove_reader(sock.fileno())
    _data, fds, _flags, _address = socket.recv_fds(sock, 1, STREAMS)
    for fd in fds:
        os.set_inheritable(fd, False)  # `recv_fds` takes no flags in 3.11, and a child must not hold a client's streams
    if len(fds) != STREAMS:
        for fd in fds:
            os.close(fd)
        raise InvalidInput(f"the client has to attach {STREAMS} streams, got {len(fds)}")
    return fds[0], fds[1], fds[2]
