"""
The server side of `clawker-cp run`: one UNIX socket, one connection per sandbox.

Accepts root and its own user only (kernel-attested), turns requests into lives of sandboxes and
sends back decisions and the end. Framing is `local_protocol`'s; lives, flows and reports are
passed in by the application.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import structlog

from clawker_cp.errors import ClawkerError, Conflict, InvalidInput, Unavailable
from clawker_cp.rpc.local_protocol import SANDBOX_GONE, LocalChannel, peer_credentials, receive_streams

log = structlog.get_logger()

HANDSHAKE_LIMIT_S = 5.0
CLIENTS_LIMIT = 256
ORPHAN_GRACE_S = 5.0
ACCEPT_PAUSE_S = 0.2
# What accept(2) says of this moment, not of the listener; a client that stays in the queue is served later.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED})


class Lives(Protocol):
    """The lives of sandboxes, `agents.lifecycle.SandboxLives`."""

    def prepared(self, request: Any) -> AbstractAsyncContextManager[Any]: ...
    async def launch(self, sandbox_id: str, streams: tuple[int, int, int]) -> None: ...
    async def finish(self, sandbox_id: str) -> int: ...
    async def signal(self, sandbox_id: str, signo: int) -> None: ...
    async def stop(self, sandbox_id: str, *, grace_s: float) -> None: ...
    def knows(self, sandbox_id: str) -> bool: ...


class Reports(Protocol):
    """Decisions of one sandbox as they come, and what is said at its end."""

    def watch(self, sandbox_id: str) -> AbstractAsyncContextManager[AsyncIterator[Mapping[str, Any]]]: ...
    def ending(self, sandbox_id: str) -> Mapping[str, Any]: ...


class LocalServer:
    """
    Serves `run` clients until closed; at most `CLIENTS_LIMIT` at once, further ones are refused.

    A client that goes away without a new one attaching within `ORPHAN_GRACE_S` takes its sandbox
    with it: its standard streams are gone, nobody would see what it does.
    """

    def __init__(
        self, path: Path, lives: Lives, reports: Reports, make_request: Callable[[Mapping[str, Any]], Any]
    ) -> None:
        self._path = path
        self._lives = lives
        self._reports = reports
        self._make_request = make_request
        self._listener: socket.socket | None = None
        self._clients = 0
        self._attached: dict[str, int] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def idle(self) -> bool:
        """
        Whether no client is being served.
        """
        return self._clients == 0

    def attached(self, sandbox_id: str) -> bool:
        """
        Whether a client follows a sandbox now.
        """
        return sandbox_id in self._attached

    def open(self) -> None:
        """
        Bind the socket, mode 0600, replacing one that nobody listens on any more.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        except OSError as error:
            listener.close()
            raise Unavailable(f"cannot listen at {self._path}: {error.strerror}") from error
        finally:
            os.umask(previous)
        listener.listen(64)
        listener.setblocking(False)
        self._listener = listener

    async def serve(self, on_change: Callable[[], None]) -> None:
        """
        Accept and serve until cancelled; `on_change` is called whenever a client has gone.
        """
        listener = self._listener
        if listener is None:
            raise Conflict("the local socket is not open")
        async with asyncio.TaskGroup() as group:
            while True:
                sock = await _accepted(listener)
                if self._clients >= CLIENTS_LIMIT or not _may_connect(sock):
                    sock.close()
                    continue
                self._clients += 1
                group.create_task(self._client(sock, on_change), name="local-client")

    def close(self) -> None:
        """
        Stop listening and remove the socket; clients that are served go on until cancelled.
        """
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)

    async def _client(self, sock: socket.socket, on_change: Callable[[], None]) -> None:
        try:
            await self._serve_client(sock)
        except Exception as error:  # noqa: BLE001 - one client's failure must never reach the others
            log.warning("rpc_local_client_failed", error=str(error) or type(error).__name__)
        finally:
            sock.close()
            self._clients -= 1
            on_change()

    async def _serve_client(self, sock: socket.socket) -> None:
        streams = await receive_streams(sock, HANDSHAKE_LIMIT_S)
        channel: LocalChannel | None = None
        try:
            channel = await LocalChannel.over(sock)
            async with asyncio.timeout(HANDSHAKE_LIMIT_S):
                request = await channel.receive()
            if request is None:
                return
            await self._answer(channel, request, streams)
        except ClawkerError as error:
            if channel is not None:
                await _send_quietly(
                    channel, {"event": "error", "code": error.code, "message": error.message, "hint": error.hint}
                )
        finally:
            for fd in streams:
                if fd >= 0:
                    os.close(fd)
            if channel is not None:
                await channel.aclose()

    async def _answer(self, channel: LocalChannel, request: Mapping[str, Any], streams: tuple[int, int, int]) -> None:
        operation = request.get("op")
        if operation == "run":
            await self._run(channel, request, streams)
        elif operation == "attach":
            sandbox_id = str(request.get("id", ""))
            if not self._lives.knows(sandbox_id):
                ending = self._reports.ending(sandbox_id)
                if "code" not in ending:
                    raise Unavailable(f"sandbox {sandbox_id[:12]} ended while no server was there", code=SANDBOX_GONE)
                await channel.send({"event": "exit", **ending})
                return
            # Not every client has heard it: the server may have died before it could say so.
            await channel.send({"event": "started"})
            await self._follow(channel, sandbox_id)
        else:
            raise InvalidInput(f"op: {operation!r} is not run or attach")

    async def _run(self, channel: LocalChannel, request: Mapping[str, Any], streams: tuple[int, int, int]) -> None:
        async with self._lives.prepared(self._make_request(request)) as sandbox:
            await channel.send(
                {
                    "event": "created",
                    "id": sandbox.id,
                    "address": sandbox.address,
                    "publish": [{"host_port": p.host_port, "port": p.port} for p in getattr(sandbox, "publish", ())],
                }
            )
            await self._lives.launch(sandbox.id, streams)
            await channel.send({"event": "started"})
        await self._follow(channel, sandbox.id)

    async def _follow(self, channel: LocalChannel, sandbox_id: str) -> None:
        self._attached[sandbox_id] = self._attached.get(sandbox_id, 0) + 1
        left = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                flows = group.create_task(self._send_flows(channel, sandbox_id), name="local-flows")
                inbox = group.create_task(self._read_client(channel, sandbox_id, left), name="local-inbox")
                code = await self._lives.finish(sandbox_id)
                flows.cancel()
                inbox.cancel()
            await channel.send({"event": "exit", "code": code, **self._reports.ending(sandbox_id)})
        finally:
            if not left.is_set():
                self._leave(sandbox_id)

    def _leave(self, sandbox_id: str) -> None:
        self._attached[sandbox_id] -= 1
        if not self._attached[sandbox_id]:
            del self._attached[sandbox_id]

    async def _send_flows(self, channel: LocalChannel, sandbox_id: str) -> None:
        async with self._reports.watch(sandbox_id) as flows:
            async for flow in flows:
                try:
                    await channel.send({"event": "flow", "flow": flow})
                except Unavailable:
                    return

    async def _read_client(self, channel: LocalChannel, sandbox_id: str, left: asyncio.Event) -> None:
        while True:
            message = await channel.receive()
            if message is None:
                break
            if message.get("op") == "signal" and isinstance(message.get("signo"), int):
                try:
                    await self._lives.signal(sandbox_id, message["signo"])
                except ClawkerError as error:
                    log.info("rpc_local_signal_failed", id=sandbox_id, error=str(error))
        left.set()
        self._leave(sandbox_id)
        await asyncio.sleep(ORPHAN_GRACE_S)
        if sandbox_id not in self._attached:
            log.warning("rpc_local_client_gone", id=sandbox_id)
            await self._lives.stop(sandbox_id, grace_s=ORPHAN_GRACE_S)


async def _accepted(listener: socket.socket) -> socket.socket:
    """The next client; while there is no descriptor for one, it waits in the queue and nobody else is hurt."""
    told = False
    while True:
        try:
            sock, _address = await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            if not told:
                told = True
                log.warning("rpc_local_waits", cause=error.strerror)
            await asyncio.sleep(ACCEPT_PAUSE_S)
        else:
            return sock


def _may_connect(sock: socket.socket) -> bool:
    _pid, uid, _gid = peer_credentials(sock)
    allowed = uid in {0, os.geteuid()}
    if not allowed:
        log.warning("rpc_local_refused", uid=uid)
    return allowed


async def _send_quietly(channel: LocalChannel, message: dict[str, Any]) -> None:
    try:
        await channel.send(message)
    except Unavailable:
        log.info("rpc_local_client_left", message=message.get("message"))
