"""A listener's limits, each shown to be one that grpc knows: a misspelt option is silently ignored."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace
from typing import Any

import grpc
import pytest

from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.limits import ADMIN_LIMITS, AGENT_LIMITS, ANSWER_S, ListenerLimits, answer_within, listener_options
from clawker_cp.testing.rpc_world import MANY, ONE, SCOPES, Authority, Kinds, RpcWorld, active, bearer, call, outcome

GOOD = bearer("good")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RpcWorld:
    return RpcWorld(tmp_path_factory.mktemp("limits"))


def auth() -> AuthInterceptor:
    return AuthInterceptor(Authority(good=active()), SCOPES)


@pytest.mark.slow
async def test_messages_above_the_limit_are_refused(world: RpcWorld) -> None:
    """4 MiB for operators, 64 KiB for agents; just below is served."""
    for limits in (ADMIN_LIMITS, AGENT_LIMITS):
        kinds = Kinds()
        async with world.serving(auth(), kinds, limits=limits) as (_server, channel):
            room = limits.message_bytes
            assert (await outcome(channel, ONE, GOOD, text="x" * (room - 100)))[0] == "OK"
            assert (await outcome(channel, ONE, GOOD, text="x" * room))[0] == "RESOURCE_EXHAUSTED"
        assert kinds.reached == ["One"]


@pytest.mark.slow
async def test_metadata_above_16_kib_is_refused_and_below_is_not(world: RpcWorld) -> None:
    """Always, not at random as between grpc's two limits."""
    async with world.serving(auth()) as (_server, channel):
        for _ in range(3):
            assert (await outcome(channel, ONE, (("x", "y" * 15_000), *GOOD)))[0] == "OK"
            assert (await outcome(channel, ONE, (("x", "y" * 17_000), *GOOD)))[0] == "RESOURCE_EXHAUSTED"


async def test_compressed_messages_are_refused(world: RpcWorld) -> None:
    """A small message that unfolds to megabytes is not unfolded."""
    kinds = Kinds()
    async with world.serving(auth(), kinds) as (server, _channel):
        options = [("grpc.default_compression_algorithm", 2)]
        async with world.channel(server.ports[0], options=options) as channel:
            code, _ = await outcome(channel, ONE, GOOD, text="x" * 3_000_000)
            assert code in {"UNIMPLEMENTED", "INTERNAL"}
    assert kinds.reached == []


async def test_connections_above_the_limit_are_closed(world: RpcWorld) -> None:
    """Those that are open stay usable."""
    limits = replace(ADMIN_LIMITS, connections=4)
    async with world.serving(auth(), limits=limits) as (server, channel):
        assert await outcome(channel, ONE, GOOD) == ("OK", "")
        others = [await asyncio.open_connection("127.0.0.1", server.ports[0]) for _ in range(20)]
        async with asyncio.timeout(5):
            async with asyncio.TaskGroup() as group:
                ends = [group.create_task(_closed(reader)) for reader, _ in others[3:]]
        assert all(end.result() for end in ends)
        assert await outcome(channel, ONE, GOOD) == ("OK", "")
        for _, writer in others:
            writer.close()


async def _closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read(1) == b""
    except ConnectionError:
        return True


async def test_a_handshake_that_does_not_come_is_not_waited_for(world: RpcWorld) -> None:
    """Half-open connections end by themselves."""
    limits = replace(ADMIN_LIMITS, handshake_s=0.2)
    async with world.serving(auth(), limits=limits) as (server, channel):
        others = [await asyncio.open_connection("127.0.0.1", server.ports[0]) for _ in range(5)]
        async with asyncio.timeout(5):
            assert [await _closed(reader) for reader, _ in others] == [True] * 5
        assert await outcome(channel, ONE, GOOD) == ("OK", "")
        for _, writer in others:
            writer.close()


@pytest.mark.slow
async def test_an_idle_connection_is_given_up(world: RpcWorld) -> None:
    """A client that holds places without calling loses them."""
    context = world.ca.client_context()
    context.load_cert_chain(world.cli.certificate, world.cli.key)
    context.set_alpn_protocols(["h2"])
    async with world.serving(auth(), limits=replace(ADMIN_LIMITS, idle_s=1.0)) as (server, _channel):
        reader, writer = await asyncio.open_connection("localhost", server.ports[0], ssl=context)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04\x00" + bytes(4))
        async with asyncio.timeout(10):
            try:
                while await reader.read(65536):
                    pass
            except (ConnectionError, ssl.SSLError):
                pass
        writer.close()


async def test_calls_above_the_limit_are_refused(world: RpcWorld) -> None:
    """Calls at once times message size is what a stranger can make us hold."""
    entered: list[str] = []
    release = asyncio.Event()

    async def wait(name: str, _context: Any) -> None:
        entered.append(name)
        await release.wait()

    async with world.serving(auth(), Kinds(wait), limits=replace(AGENT_LIMITS, calls=3)) as (_server, channel):
        async with asyncio.TaskGroup() as group:
            held = [group.create_task(outcome(channel, ONE, GOOD)) for _ in range(3)]
            while len(entered) < 3:
                await asyncio.sleep(0.001)
            assert (await outcome(channel, ONE, GOOD))[0] == "RESOURCE_EXHAUSTED"
            release.set()
        assert [one.result() for one in held] == [("OK", "")] * 3
        assert await outcome(channel, ONE, GOOD) == ("OK", "")


async def test_streams_of_one_connection_are_bounded(world: RpcWorld) -> None:
    """
    A further one waits for a place and does not reach its handler.

    What becomes of calls that wait when a place gets free is grpc's: its client counts a stream as over when it reads
    the trailers, its server a moment later, and a call started in between is refused (UNAVAILABLE, RST_STREAM 7).
    """
    entered: list[str] = []
    release = asyncio.Event()

    async def wait(name: str, _context: Any) -> None:
        entered.append(name)
        await release.wait()

    limits = replace(ADMIN_LIMITS, streams_per_connection=2)
    async with world.serving(auth(), Kinds(wait), limits=limits) as (_server, channel), asyncio.TaskGroup() as group:
        held = [group.create_task(call(channel, MANY, GOOD)) for _ in range(2)]
        while len(entered) < 2:
            await asyncio.sleep(0.001)
        assert (await outcome(channel, ONE, GOOD, timeout=0.2))[0] == "DEADLINE_EXCEEDED"
        assert len(entered) == 2
        release.set()
    assert [one.result() for one in held] == [["x"] * 3] * 2


async def test_a_port_is_not_shared(world: RpcWorld) -> None:
    """A second listener on the same port is an error, not half of the connections."""
    async with world.serving(auth()) as (server, _channel):
        second = grpc.aio.server(options=listener_options())
        with pytest.raises(RuntimeError):
            second.add_insecure_port(f"127.0.0.1:{server.ports[0]}")


def test_the_contracts_numbers() -> None:
    """Contract 5.5."""
    assert ListenerLimits() == ADMIN_LIMITS
    assert (ADMIN_LIMITS.message_bytes, ADMIN_LIMITS.metadata_bytes) == (4 << 20, 16 << 10)
    assert (ADMIN_LIMITS.streams_per_connection, ADMIN_LIMITS.connections, ADMIN_LIMITS.handshake_s) == (256, 512, 5.0)


class Remaining:
    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def time_remaining(self) -> float | None:
        return self._seconds


@pytest.mark.parametrize(
    ("left", "limit", "expected"),
    [
        (None, ANSWER_S, 12.0),
        (15.0, ANSWER_S, 12.0),
        (5.0, ANSWER_S, 4.5),
        (0.1, ANSWER_S, 0.05),
        (210.0, 180.0, 180.0),
    ],
)
def test_an_answer_leaves_time_for_the_way_back(left: float | None, limit: float, expected: float) -> None:
    """min(deadline - 0.5 s, limit), never nothing at all."""
    assert answer_within(Remaining(left), limit) == pytest.approx(expected)
