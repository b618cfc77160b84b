"""Published ports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from clawker_cp.engines.base import Publish
from clawker_cp.engines.host.publish import Publisher
from clawker_cp.errors import Conflict

GATEWAY, SANDBOX = "127.0.0.2", "127.0.0.3"  # stand for both ends, on this host's loopback
LIMIT_S = 10.0


@asynccontextmanager
async def echo(peers: list[str]) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(writer.get_extra_info("peername")[0])
        writer.write(await reader.read())
        writer.close()

    async with await asyncio.start_server(serve, SANDBOX, 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_bytes_pass_both_ways_and_come_from_the_gateway() -> None:
    """A connection to the chosen port reaches the sandbox, half-close included, from the gateway's address."""
    peers: list[str] = []
    publisher = Publisher(GATEWAY)
    async with asyncio.timeout(LIMIT_S), echo(peers) as port:
        try:
            (made,) = await publisher.publish("a", SANDBOX, [Publish(0, port)])
            assert made.port == port
            assert made.host_port > 0
            reader, writer = await asyncio.open_connection("127.0.0.1", made.host_port)
            writer.write(b"x" * 300_000)
            writer.write_eof()
            assert await reader.read() == b"x" * 300_000
            writer.close()
            assert peers == [GATEWAY]
        finally:
            await publisher.aclose()


async def test_busy_port_is_named_and_the_others_are_given_back() -> None:
    """When one port cannot be had, none of that sandbox stays open."""
    publisher = Publisher(GATEWAY)
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        busy, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        with pytest.raises(Conflict, match=f"--publish: 127.0.0.1:{busy}"):
            await publisher.publish("a", SANDBOX, [Publish(free, 80), Publish(busy, 80)])
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", free)


async def test_withdrawn_port_closes_what_is_open() -> None:
    """Withdrawing ends open connections and the listener."""
    publisher = Publisher(GATEWAY)
    async with asyncio.timeout(LIMIT_S), echo([]) as port:
        (made,) = await publisher.publish("a", SANDBOX, [Publish(0, port)])
        reader, writer = await asyncio.open_connection("127.0.0.1", made.host_port)
        writer.write(b"held open")
        await writer.drain()
        await publisher.withdraw("a")
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", made.host_port)
