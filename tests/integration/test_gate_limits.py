"""
What the gate takes of agents, forwarders and the proxy, and what it does where they fail or flood.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import dns.asyncquery
import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest
import uvloop

from clawker_cp.dns import BudgetSettings
from clawker_cp.errors import Conflict
from clawker_cp.testing.dns_world import Resolver
from clawker_cp.testing.gate_world import (
    AGENT,
    ALLOWED,
    OTHER,
    RECORDS,
    STRANGER,
    World,
    addresses,
    extended_error,
    running,
)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as made:
        yield made


async def test_budget_of_names() -> None:
    """Distinct names below a wildcard count per agent and registered domain; above the bound NXDOMAIN `budget`."""
    async with running(budget=BudgetSettings(names=10)) as world:
        world.policies.below[3] = dict(world.policies.below[2])
        for number in range(10):
            assert extended_or_none(await world.ask(f"n{number}.x.wild.example")) is None
        over = await world.ask("n10.x.wild.example")
        assert over.rcode() == dns.rcode.NXDOMAIN
        assert extended_error(over) == (15, "clawker: budget")
        assert extended_or_none(await world.ask("n1.wild.example", client=OTHER)) is None
        assert addresses(await world.ask("api.example.com")) == ["203.0.113.7"], "exact names have no budget"
        assert len(world.resolver.asked) == 12


def extended_or_none(reply: dns.message.Message) -> tuple[int, str] | None:
    return extended_error(reply) if reply.options else None


async def test_budget_of_txt() -> None:
    """TXT and NULL questions have a bound of their own, repeats and refused types included."""
    async with running(budget=BudgetSettings(txt=4)) as world:
        for kind in ("TXT", "NULL", "TXT", "NULL"):
            assert (await world.ask("txt.wild.example", kind)).rcode() == dns.rcode.NOERROR
        assert extended_error(await world.ask("txt.wild.example", "TXT"))[1] == "clawker: budget"
        assert extended_error(await world.ask("a.wild.example"))[1] == "clawker: budget"


async def test_dead_forwarders() -> None:
    """With no forwarder the answer is SERVFAIL EDE 22 after three tries, and health says so."""
    async with running(try_s=0.05) as world:
        world.resolver.silent = True
        reply = await world.ask("api.example.com")
        assert reply.rcode() == dns.rcode.SERVFAIL
        assert extended_error(reply)[0] == 22
        assert len(world.resolver.asked) == 3
        assert world.records[-1].reason == "forwarder_failed"
        assert not world.gate.statistics().forwarders_healthy
        world.resolver.silent = False
        assert addresses(await world.ask("api.example.com")) == ["203.0.113.7"]
        assert world.gate.statistics().forwarders_healthy


async def test_failover() -> None:
    """A forwarder that refuses or is closed is followed by the next, which is asked first from then on."""
    async with Resolver(RECORDS).serve() as second:
        with socket.socket(type=socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            dead = f"127.0.0.1:{closed.getsockname()[1]}"
        async with running(forwarders=(dead, second.address)) as world:
            assert addresses(await world.ask("api.example.com")) == ["203.0.113.7"]
            before = world.gate.statistics().forwarders_asked
            assert (await world.ask("mail.example.com", "MX")).answer
            assert world.gate.statistics().forwarders_asked == before + 1


async def test_forwarded_questions_are_hard_to_guess(world: World) -> None:
    """Each forwarded question has a port of its own and a random case."""
    for number in range(12):
        await world.ask(f"n{number}.long-name-with-letters.wild.example")
    assert len(set(world.resolver.ports)) > 6
    assert any(name != name.lower() for name, _, _ in world.resolver.asked)


async def test_proxy_view(world: World) -> None:
    """The proxy view answers names some policy allows, by the same address rules, and writes no rows."""
    port = world.gate.proxy_view_port
    assert addresses(await world.ask("api.example.com", client="127.0.0.1", port=port)) == ["203.0.113.7"]
    assert addresses(await world.ask("api.example.com", client="127.0.0.1", port=port, tcp=True)) == ["203.0.113.7"]
    assert (await world.ask("evil.example", client="127.0.0.1", port=port)).rcode() == dns.rcode.NXDOMAIN
    assert (await world.ask("rebind.example.com", client="127.0.0.1", port=port)).rcode() == dns.rcode.NXDOMAIN
    assert world.kernel.rows == {}


async def test_the_proxy_view_may_be_the_proxys_alone() -> None:
    """Where others get to its address as well, whoever is not the proxy is refused, whatever it asks."""
    async with running(proxy_view_client="127.0.0.1") as world:
        port = world.gate.proxy_view_port
        proxys = await world.ask("api.example.com", client="127.0.0.1", port=port)
        others = [await world.ask("api.example.com", client=AGENT, port=port, tcp=tcp) for tcp in (False, True)]
        asked = len(world.resolver.asked)
        await world.ask("short.example.com", client=STRANGER, port=port)

    assert addresses(proxys) == ["203.0.113.7"]
    for other in others:
        assert (other.rcode(), extended_error(other)) == (dns.rcode.REFUSED, (18, "clawker: unknown client"))
    assert len(world.resolver.asked) == asked


async def test_waiting_questions_are_bounded() -> None:
    """An agent that makes too many questions wait gets SERVFAIL for the rest; others are not affected."""
    async with running(waiting_per_agent=5, try_s=5.0) as world:
        world.resolver.held = asyncio.Event()
        world.policies.exact[3] = {"api.example.com": ALLOWED}
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(world.ask(f"n{number}.wild.example")) for number in range(8)]
            async with asyncio.timeout(5):
                while sum(task.done() for task in asked) < 3 or world.gate.statistics().waiting < 5:
                    await asyncio.sleep(0)
            other = group.create_task(world.ask("api.example.com", client=OTHER))
            async with asyncio.timeout(5):
                while world.gate.statistics().waiting < 6:
                    await asyncio.sleep(0)
            world.resolver.held.set()
        assert addresses(other.result()) == ["203.0.113.7"]
        assert sorted(task.result().rcode() for task in asked) == [2] * 3 + [3] * 5


async def test_connections_are_bounded() -> None:
    """An agent has so many connections, and a silent one is closed."""
    async with running(connections_per_client=2, idle_s=0.3) as world:
        streams = [await asyncio.open_connection("127.0.0.1", world.port, local_addr=(AGENT, 0)) for _ in range(3)]
        try:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(streams[2][0].readexactly(1), 5)
            assert addresses(await world.ask("clawker-controlplane", client=OTHER, tcp=True)) == ["198.51.100.2"]
            for reader, writer in streams[:2]:
                writer.write(b"\0")
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await asyncio.wait_for(reader.readexactly(1), 5)
            async with asyncio.timeout(5):
                while world.gate.statistics().connections:
                    await asyncio.sleep(0.01)
        finally:
            for _, writer in streams:
                writer.close()


async def test_many_messages_on_one_connection(world: World) -> None:
    """Pipelined questions are all answered, more of them than may wait at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port, local_addr=(AGENT, 0))
    try:
        for number in range(64):
            raw = dns.message.make_query(f"n{number}.wild.example", "A", id=number).to_wire()
            writer.write(struct.pack("!H", len(raw)) + raw)
        seen: set[int] = set()
        async with asyncio.timeout(10):
            while len(seen) < 64:
                (size,) = struct.unpack("!H", await reader.readexactly(2))
                seen.add(dns.message.from_wire(await reader.readexactly(size)).id)
        assert seen == set(range(64))
    finally:
        writer.close()


async def test_garbage(world: World) -> None:
    """Random octets and mutated questions over UDP and TCP leave the gate serving."""
    chance = random.Random(3)
    good = dns.message.make_query("api.example.com", "A", use_edns=0).to_wire()
    loop = asyncio.get_running_loop()
    failures: list[Any] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.bind((AGENT, 0))
        for number in range(2000):
            raw = bytearray(good if number % 2 else chance.randbytes(chance.randrange(200)))
            for _ in range(chance.randrange(4)):
                if raw:
                    raw[chance.randrange(len(raw))] = chance.randrange(256)
            client.sendto(
                bytes(raw[: chance.randrange(len(raw) + 1)] if number % 5 == 0 else raw), ("127.0.0.1", world.port)
            )
            if number % 50 == 0:
                await asyncio.sleep(0)
    for number in range(50):
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port, local_addr=(AGENT, 0))
        writer.write(os.urandom(600) if number % 2 else b"\0\0" + os.urandom(5))
        writer.close()
        del reader
    assert addresses(await world.ask("api.example.com")) == ["203.0.113.7"]
    assert failures == []


async def test_garbage_from_a_forwarder(world: World) -> None:
    """Whatever a forwarder answers with, the client gets SERVFAIL or a clean answer."""
    chance = random.Random(4)

    def mutate(query: dns.message.Message, transport: str) -> bytes:
        raw = bytearray(world.resolver.reply(query).to_wire())
        size = 12 + len(query.question[0].name.to_wire() or b"") + 4
        for _ in range(6):
            raw[chance.randrange(size, len(raw))] = chance.randrange(256)
        return bytes(raw)

    world.resolver.hook = mutate
    for _ in range(60):
        world.gate.flush_cache()
        reply = await world.ask("api.example.com")
        assert reply.rcode() in (0, 2, 3)


async def test_busy_port() -> None:
    """A taken address is a Conflict that names it, and nothing stays bound."""
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ExceptionGroup) as caught:
            async with running(port=taken.getsockname()[1]):
                pass
        (error,) = caught.value.exceptions
        while isinstance(error, ExceptionGroup):
            (error,) = error.exceptions
        assert isinstance(error, Conflict)
        assert str(taken.getsockname()[1]) in str(error)


def test_on_uvloop() -> None:
    """The same gate serves on the loop that production uses."""

    async def main() -> None:
        async with running() as world:
            assert addresses(await world.ask("api.example.com")) == ["203.0.113.7"]
            assert addresses(await world.ask("api.example.com", tcp=True)) == ["203.0.113.7"]
            assert (await world.ask("evil.example")).rcode() == dns.rcode.NXDOMAIN
            await test_garbage(world)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
