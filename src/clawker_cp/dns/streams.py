"""
DNS over TCP: framing and bounds. Every connection, message and octet that is held has a limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from clawker_cp.dns.settings import GateSettings

MAX_MESSAGE = 65_535
OUTSTANDING = 16  # questions of one connection that wait; more are read when these are answered
UNSENT_BYTES = 64 * 1024


class Ask(Protocol):
    """Answer one message later through `send`; False if it gets no answer."""

    def __call__(self, data: bytes, client: str, send: Callable[[bytes], None], /, *, limit: int) -> bool: ...


class Connections:
    """The open connections, counted by client address."""

    def __init__(self, settings: GateSettings) -> None:
        self.idle_s = settings.idle_s
        self._per_client = settings.connections_per_client
        self._limit = settings.connections
        self._open: dict[str, set[Connection]] = {}
        self._count = 0
        self.refused = 0

    def __len__(self) -> int:
        return self._count

    def admit(self, client: str, connection: Connection) -> bool:
        """Count a connection in; False if the client or the gate has enough."""
        mine = self._open.get(client, set())
        if len(mine) >= self._per_client or self._count >= self._limit:
            self.refused += 1
            return False
        mine.add(connection)
        self._open[client] = mine
        self._count += 1
        return True

    def remove(self, client: str, connection: Connection) -> None:
        """Count a connection out."""
        mine = self._open.get(client)
        if mine is not None and connection in mine:
            mine.discard(connection)
            self._count -= 1
            if not mine:
                del self._open[client]

    def abort(self) -> None:
        """Cut all of them."""
        for mine in list(self._open.values()):
            for connection in list(mine):
                connection.abort()


class Connection(asyncio.Protocol):
    """
    One client connection; answers may leave in another order than questions came.

    Closed when no whole question arrived and none was answered for `idle_s`, so a client that sends or
    reads octet by octet holds it no longer than one that is silent.
    """

    def __init__(self, connections: Connections, ask: Ask) -> None:
        self._connections = connections
        self._ask = ask
        self._buffer = bytearray()
        self._outstanding = 0
        self._unsent = False
        self._ended = False
        self._client = ""
        self._last_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit or cut."""
        # uvloop's transports do not derive from asyncio's.
        stream = cast("asyncio.Transport", transport)
        peer = stream.get_extra_info("peername")
        client = peer[0] if peer else ""
        if not client or not self._connections.admit(client, self):
            stream.abort()
            return
        self._client = client
        self._transport = stream
        stream.set_write_buffer_limits(high=UNSENT_BYTES)
        self._last_s = self._loop.time()
        self._timer = self._loop.call_later(self._connections.idle_s, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count out; answers that are still waited for are dropped."""
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None
        self._buffer.clear()
        if self._client:
            self._connections.remove(self._client, self)

    def data_received(self, data: bytes) -> None:
        """Take octets; at most one message and one read are held."""
        if self._transport is not None:
            self._buffer += data
            self._pump()

    def eof_received(self) -> bool:
        """Stay open for answers that wait; the idle limit ends it otherwise."""
        self._ended = True
        return self._outstanding > 0 or self._unsent

    def pause_writing(self) -> None:
        """Read no more until the client takes its answers."""
        self._unsent = True
        self._flow()

    def resume_writing(self) -> None:
        """Read again."""
        self._unsent = False
        self._pump()

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _pump(self) -> None:
        """Ask whole messages as long as answers may be held."""
        while not self._unsent and self._outstanding < OUTSTANDING and self._transport is not None:
            if len(self._buffer) < 2:
                break
            size = int.from_bytes(self._buffer[:2], "big")
            if len(self._buffer) < 2 + size:
                break
            message = bytes(self._buffer[2 : 2 + size])
            del self._buffer[: 2 + size]
            self._last_s = self._loop.time()
            self._outstanding += 1
            if not self._ask(message, self._client, self._send, limit=MAX_MESSAGE):
                # Nothing can be said to it, and silence on a stream is only a way to hold it.
                self.abort()
                return
        self._flow()

    def _flow(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._unsent or self._outstanding >= OUTSTANDING:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _send(self, reply: bytes) -> None:
        self._outstanding -= 1
        if self._transport is None or self._transport.is_closing():
            return
        self._last_s = self._loop.time()
        self._transport.write(len(reply).to_bytes(2, "big") + reply)
        if self._ended and self._outstanding == 0:
            self._transport.close()
            return
        if self._outstanding == OUTSTANDING - 1:
            # It was full: go on with what is in the buffer, but not deeper into this stack.
            self._loop.call_soon(self._pump)

    def _tick(self) -> None:
        left_s = self._last_s + self._connections.idle_s - self._loop.time()
        if left_s <= 0:
            self.abort()
        else:
            self._timer = self._loop.call_later(left_s, self._tick)
