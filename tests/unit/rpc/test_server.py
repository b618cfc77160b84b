"""A listener binds what it can serve, in the contract's order, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.errors import ClawkerError, Unavailable
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.interceptors.ready import ReadyGate
from clawker_cp.rpc.interceptors.recovery import Recovery
from clawker_cp.rpc.server import RpcServer, interceptor_chain, served_methods
from clawker_cp.testing.rpc_world import (
    ONE,
    SCOPES,
    Authority,
    Kinds,
    RpcWorld,
    active,
    bearer,
    outcome,
)

GOOD = bearer("good")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RpcWorld:
    return RpcWorld(tmp_path_factory.mktemp("server"))


def auth(scopes: dict[str, str] = SCOPES) -> AuthInterceptor:
    return AuthInterceptor(Authority(good=active()), scopes)


def test_the_order_is_the_contracts() -> None:
    """Recovery, ready gate where there is one, auth, identity."""
    one, identity = auth(), ReadyGate(lambda: True)
    chain = interceptor_chain(one, is_ready=lambda: True, identity=[identity])
    assert isinstance(chain[0], Recovery) and isinstance(chain[1], ReadyGate)
    assert chain[2:] == [*one.interceptors(), identity]
    assert len(interceptor_chain(one)) == 2


def test_what_is_served_is_known_before_it_is_served() -> None:
    """By full method name."""
    assert served_methods([Kinds().register]) == set(SCOPES)


async def test_an_unmapped_method_keeps_the_listener_shut(world: RpcWorld) -> None:
    """The error names every method, and no port was bound."""
    server = RpcServer("admin", ["127.0.0.1:0"], world.material, auth({ONE: "admin"}), [Kinds().register])
    with pytest.raises(ClawkerError, match=r"admin: no scope for .*Chat, .*Many, .*Sum$") as raised:
        await server.start()
    assert raised.value.code == "UNMAPPED_METHOD" and server.ports == ()
    await server.stop()


async def test_an_address_in_use_is_named_and_the_others_are_given_back(world: RpcWorld) -> None:
    """A listener is on all of its addresses or on none."""
    async with world.serving(auth()) as (first, _channel):
        addresses = ["127.0.0.1:0", f"127.0.0.1:{first.ports[0]}"]
        second = RpcServer("second", addresses, world.material, auth(), [Kinds().register])
        with pytest.raises(Unavailable, match=rf"second: 127\.0\.0\.1:{first.ports[0]} cannot be bound"):
            await second.start()
        await second.stop()


async def test_two_addresses_are_one_listener(world: RpcWorld) -> None:
    """With one cache: a token seen on one is known on the other."""
    authority = Authority(good=active())
    one = AuthInterceptor(authority, SCOPES)
    server = RpcServer("both", ["127.0.0.1:0", "127.0.0.1:0"], world.material, one, [Kinds().register])
    ports = await server.start()
    try:
        for port in ports:
            async with world.channel(port) as channel:
                assert await outcome(channel, ONE, GOOD) == ("OK", "")
    finally:
        await server.stop(0)
    assert len(set(ports)) == 2 and authority.asked == ["good"]


async def test_a_stop_lets_calls_in_flight_end_and_takes_no_new_ones(world: RpcWorld) -> None:
    """Within the grace."""
    entered, release = asyncio.Event(), asyncio.Event()

    async def wait(_name: str, _context: Any) -> None:
        entered.set()
        await release.wait()

    async with world.serving(auth(), Kinds(wait)) as (server, channel), asyncio.TaskGroup() as group:
        held = group.create_task(outcome(channel, ONE, GOOD))
        await entered.wait()
        stopping = group.create_task(server.stop(5.0))
        async with world.channel(server.ports[0]) as late:
            assert (await outcome(late, ONE, GOOD))[0] == "UNAVAILABLE"
        release.set()
        assert await held == ("OK", "")
        await stopping


async def test_a_stop_cancels_what_outlasts_the_grace(world: RpcWorld) -> None:
    """Handlers and questions to the authority alike; a second stop does nothing."""
    authority = Authority(good=active(), slow=active())
    one, entered = AuthInterceptor(authority, SCOPES), asyncio.Event()

    async def wait(_name: str, _context: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    async with world.serving(one, Kinds(wait)) as (server, channel), asyncio.TaskGroup() as group:
        held = group.create_task(outcome(channel, ONE, GOOD))
        await entered.wait()
        authority.go.clear()
        asking = group.create_task(outcome(channel, ONE, bearer("slow")))
        while len(authority.asked) < 2:
            await asyncio.sleep(0.001)
        async with asyncio.timeout(5):
            await server.stop(0.05)
        assert (await held)[0] == "UNAVAILABLE" and (await asking)[0] == "UNAVAILABLE"
        await server.stop()
    assert one.statistics()["asking"] == 0


async def test_the_end_of_a_listener_is_noticed(world: RpcWorld) -> None:
    """Who waits for it is woken by a stop, and at once when it never started."""
    async with world.serving(auth()) as (server, _channel), asyncio.TaskGroup() as group:
        waiting = group.create_task(server.wait_stopped())
        await asyncio.sleep(0)
        assert not waiting.done()
        await server.stop(0)
        async with asyncio.timeout(5):
            await waiting
    async with asyncio.timeout(5):
        await RpcServer("never", [], world.material, auth(), []).wait_stopped()


async def test_a_start_without_material_binds_nothing(tmp_path: Path) -> None:
    """What is wrong with the certificates comes first."""
    world = RpcWorld(tmp_path)
    world.server.key.unlink()
    server = RpcServer("x", ["127.0.0.1:0"], world.material, auth(), [Kinds().register])
    with pytest.raises(FileNotFoundError):
        await server.start()
    assert server.ports == ()
