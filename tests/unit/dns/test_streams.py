"""
Framing and bounds of DNS over TCP, on real sockets, with an answerer of the test's own.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from clawker_cp.dns.settings import GateSettings
from clawker_cp.dns.streams import OUTSTANDING, Connection, Connections


class Answerer:
    """Echo each message, at once or when told; b"bad" gets no answer."""

    def __init__(self) -> None:
        self.held: list[tuple[bytes, Callable[[bytes], None]]] = []
        self.hold = False

    def __call__(self, data: bytes, client: str, send: Callable[[bytes], None], /, *, limit: int) -> bool:
        if data == b"bad":
            return False
        if self.hold:
            self.held.append((data, send))
        else:
            send(data)
        return True


@asynccontextmanager
async def serving(answerer: Answerer, **changes: float) -> AsyncIterator[tuple[Connections, int]]:
    connections = Connections(GateSettings(**changes))  # type: ignore[arg-type]
    server = await asyncio.get_running_loop().create_server(lambda: Connection(connections, answerer), "127.0.0.1", 0)
    try:
        yield connections, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        connections.abort()
        async with asyncio.timeout(5):
            while len(connections):
                await asyncio.sleep(0)


def framed(*messages: bytes) -> bytes:
    return b"".join(struct.pack("!H", len(message)) + message for message in messages)


async def test_octet_by_octet() -> None:
    """Messages are put together from any pieces."""
    async with serving(Answerer()) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for octet in framed(b"hello", b"", b"world"):
            writer.write(bytes((octet,)))
            await writer.drain()
        assert await asyncio.wait_for(reader.readexactly(16), 5) == framed(b"hello", b"", b"world")
        writer.close()


async def test_message_without_an_answer_ends_the_connection() -> None:
    """What can get no answer is cut, so that it holds nothing."""
    async with serving(Answerer()) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(framed(b"bad"))
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()


async def test_outstanding_messages_are_bounded() -> None:
    """A connection has so many questions waiting; the others follow as answers leave."""
    answerer = Answerer()
    answerer.hold = True
    async with serving(answerer) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        messages = [f"m{number:03}".encode() for number in range(3 * OUTSTANDING)]
        writer.write(framed(*messages))
        seen: list[bytes] = []
        async with asyncio.timeout(5):
            while len(seen) < len(messages):
                while len(answerer.held) < min(OUTSTANDING, len(messages) - len(seen)):
                    await asyncio.sleep(0)
                assert len(answerer.held) <= OUTSTANDING
                data, send = answerer.held.pop(0)
                send(data)
                seen.append(await reader.readexactly(6))
        assert b"".join(seen) == framed(*messages)
        writer.close()


async def test_half_closed_client_still_gets_its_answers() -> None:
    """A client may end its side after asking; the last answer ends ours."""
    answerer = Answerer()
    answerer.hold = True
    async with serving(answerer) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(framed(b"last"))
        writer.write_eof()
        async with asyncio.timeout(5):
            while not answerer.held:
                await asyncio.sleep(0)
            data, send = answerer.held.pop()
            send(data)
            assert await reader.read() == framed(b"last")
        writer.close()


async def test_clients_that_do_not_read() -> None:
    """A client that asks and never reads is paused and then cut; what is held for it stays small."""
    async with serving(Answerer(), idle_s=0.2) as (connections, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        transport = writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        writer.transport.set_write_buffer_limits(high=1 << 20)
        writer.write(framed(*[bytes(60_000)] * 400))
        async with asyncio.timeout(10):
            while not len(connections):
                await asyncio.sleep(0)
            while len(connections):
                await asyncio.sleep(0.01)
        writer.transport.abort()
        del reader


async def test_all_connections_are_bounded() -> None:
    """More than the gate may have are cut, whoever they are from."""
    async with serving(Answerer(), connections=2) as (connections, port):
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        ended = 0
        for reader, _ in streams[2:]:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 5)
            ended += 1
        assert (ended, connections.refused, len(connections)) == (2, 2, 2)
        for _, writer in streams:
            writer.close()
