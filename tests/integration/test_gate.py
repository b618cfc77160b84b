"""
What the gate answers whom, between agents at loopback addresses and a real resolver.
"""

from __future__ import annotations

import asyncio
import ipaddress
import struct
import time
from collections.abc import AsyncIterator

import dns.asyncquery
import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from clawker_cp.errors import CapacityExceeded, Unavailable
from clawker_cp.firewall.plan import IDENTITY_HTTP, NameVerdict
from clawker_cp.testing.dns_world import Resolver
from clawker_cp.testing.gate_world import (
    AGENT,
    OTHER,
    STRANGER,
    World,
    addresses,
    extended_error,
    mapped,
    running,
)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as made:
        yield made


async def test_allowed_name_reaches_the_kernel_before_the_client(world: World) -> None:
    """The addresses of an allowed name come through its aliases, and their rows are in the kernel by then (I7)."""
    before_ns = time.monotonic_ns()
    reply = await world.ask("API.example.com")
    assert addresses(reply) == ["203.0.113.7"]
    assert [found.ttl for found in reply.answer] == [300, 40]
    assert reply.flags & 0xFFF0 == dns.flags.QR | dns.flags.RD | dns.flags.RA
    row = world.kernel.rows[7, mapped("203.0.113.7")]
    assert row.identity == IDENTITY_HTTP
    assert 360 <= (row.expires_ns - before_ns) / 1e9 < 365
    record = world.records[-1]
    assert (record.name, record.verdict, record.reason, record.rule_id) == (
        "api.example.com",
        "allowed",
        "answered",
        "r1",
    )
    assert record.answers == (ipaddress.ip_address("203.0.113.7").packed,)


async def test_second_question_is_answered_from_the_cache(world: World) -> None:
    """An answer is asked once while its TTL lasts, for all spellings; each agent gets rows of its own."""
    world.policies.exact[3] = {"api.example.com": NameVerdict(True, identity=999)}
    await world.ask("api.example.com")
    await world.ask("Api.Example.Com")
    assert addresses(await world.ask("api.example.com", client=OTHER)) == ["203.0.113.7"]
    assert len(world.resolver.asked) == 1
    assert [record.cached for record in world.records] == [False, True, True]
    assert world.kernel.rows[8, mapped("203.0.113.7")].identity == 999
    assert world.kernel.writes == 2


async def test_rows_are_written_again_when_they_were_removed_or_differ(world: World) -> None:
    """After `forget`, or with another identity, the next answer writes its rows again."""
    await world.ask("api.example.com")
    await world.ask("api.example.com")
    assert world.kernel.writes == 1
    world.gate.forget(7)
    await world.ask("api.example.com")
    assert world.kernel.writes == 2
    world.policies.exact[2]["api.example.com"] = NameVerdict(True, identity=301)
    world.policies.changed()
    await world.ask("api.example.com")
    assert world.kernel.rows[7, mapped("203.0.113.7")].identity == 301


async def test_denied_name(world: World) -> None:
    """NXDOMAIN, the SOA of contract 8.1, the reason and the event id; nothing leaves."""
    reply = await world.ask("www.evil.example")
    assert reply.rcode() == dns.rcode.NXDOMAIN
    assert reply.authority[0].to_text() == "evil.example. 1 IN SOA clawker. gate.clawker. 1 1 1 1 1"
    code, text = extended_error(reply)
    assert (code, text) == (15, f"clawker: not allowed; not_allowed; {world.records[-1].event_id}")
    assert world.resolver.asked == []
    assert world.kernel.rows == {}
    assert (await world.ask("example")).authority[0].name.to_text() == "."


@pytest.mark.parametrize("kind", ["A", "AAAA", "TXT", "ANY", "NULL", "HTTPS", "DS"])
async def test_exact_name_speaks_for_itself_only(world: World, kind: str) -> None:
    """Below an exact name everything is NXDOMAIN, whatever the type."""
    assert (await world.ask("x.api.example.com", kind)).rcode() == dns.rcode.NXDOMAIN


async def test_deny_rule_has_its_reason(world: World) -> None:
    """A name denied by a rule inside an allowed wildcard says so."""
    reply = await world.ask("denied.wild.example")
    assert "rule_deny" in extended_error(reply)[1]
    assert (world.records[-1].reason, world.records[-1].rule_id) == ("rule_deny", "r9")


async def test_without_edns(world: World) -> None:
    """A client without EDNS gets no OPT back and at most 512 octets."""
    reply = await world.ask("www.evil.example", use_edns=-1)
    assert (reply.rcode(), reply.edns) == (dns.rcode.NXDOMAIN, -1)
    assert (await world.ask("many.example.com", use_edns=-1)).flags & dns.flags.TC


async def test_truncation_and_tcp(world: World) -> None:
    """What does not fit is truncated over UDP and whole over TCP."""
    reply = await world.ask("many.example.com", payload=4096)
    assert (bool(reply.flags & dns.flags.TC), reply.answer) == (True, [])
    assert len(addresses(await world.ask("many.example.com", tcp=True))) == 100
    assert len(world.kernel.rows) == 100


async def test_forwarder_that_truncates_is_asked_over_tcp(world: World) -> None:
    """TC from a forwarder leads to the same question over TCP."""
    world.resolver.truncate = True
    assert addresses(await world.ask("api.example.com")) == ["203.0.113.7"]
    assert [transport for _, _, transport in world.resolver.asked] == ["udp", "tcp"]


async def test_forwarder_that_changes_the_case_is_asked_over_tcp(world: World) -> None:
    """An answer with another case may be a guess: TCP decides."""
    world.resolver.lower_case = True
    assert addresses(await world.ask("api.example.com")) == ["203.0.113.7"]
    assert world.resolver.asked[-1][2] == "tcp"


async def test_unknown_client(world: World) -> None:
    """An address that is no agent's gets REFUSED with EDE 18, over UDP and TCP."""
    for tcp in (False, True):
        reply = await world.ask("api.example.com", client=STRANGER, tcp=tcp)
        assert reply.rcode() == dns.rcode.REFUSED
        assert extended_error(reply) == (18, "clawker: unknown client")


@pytest.mark.parametrize(
    ("name", "left"),
    [("inside.example.com", ["203.0.113.9"]), ("rebind.example.com", []), ("host.example.com", [])],
)
async def test_addresses_that_may_not_be_answered(world: World, name: str, left: list[str]) -> None:
    """Private, loopback, link-local and host addresses are dropped; nothing left is NXDOMAIN `address_refused`."""
    world.gate.set_reserved([ipaddress.ip_network("198.51.100.0/24")])
    reply = await world.ask(name)
    assert addresses(reply) == left
    if not left:
        assert reply.rcode() == dns.rcode.NXDOMAIN
        assert world.records[-1].reason == "address_refused"
        assert world.kernel.rows == {}


async def test_private_addresses_where_the_rule_allows_them(world: World) -> None:
    """`allow_private` of one agent's rule lets its own answers through, not another's from the same cache."""
    await world.ask("inside.example.com")
    world.policies.exact[3] = {"inside.example.com": NameVerdict(True, identity=301, allow_private=True)}
    assert addresses(await world.ask("inside.example.com", client=OTHER)) == ["10.1.2.3", "203.0.113.9"]
    assert addresses(await world.ask("inside.example.com")) == ["203.0.113.9"]
    assert (7, mapped("10.1.2.3")) not in world.kernel.rows


async def test_zone_with_its_own_forwarders() -> None:
    """The longest zone decides who is asked; its private addresses pass."""
    async with Resolver({("db.corp.example", "A"): ["@ 60 A 10.9.9.8"]}).serve() as own:
        async with running(zones={"corp.example": (own.address,)}) as world:
            assert addresses(await world.ask("db.corp.example")) == ["10.9.9.8"]
            assert world.resolver.asked == []
            assert world.records[-1].zone == "corp.example"


async def test_kernel_that_refuses(world: World) -> None:
    """No write, no answer: SERVFAIL with EDE 0, and the next question tries again."""
    for refusal in (CapacityExceeded("name cache of the agent is full", limit="names"), OSError(7, "E2BIG")):
        world.kernel.refusal = refusal
        reply = await world.ask("api.example.com")
        assert (reply.rcode(), reply.answer) == (dns.rcode.SERVFAIL, [])
        assert extended_error(reply) == (0, "clawker: enforcement unavailable")
        assert (world.records[-1].verdict, world.records[-1].reason) == ("failed", "map_write_failed")
    world.kernel.refusal = None
    assert addresses(await world.ask("api.example.com")) == ["203.0.113.7"]


@pytest.mark.parametrize(
    ("kind", "count", "code"), [("AAAA", 0, -1), ("ANY", 1, -1), ("NULL", 0, 17), ("DNSKEY", 0, 17), ("AXFR", 0, 17)]
)
async def test_types_that_are_not_asked(world: World, kind: str, count: int, code: int) -> None:
    """AAAA, ANY, NULL and rare types of an allowed name are answered here; nothing leaves."""
    query = dns.message.make_query("api.example.com", "A", use_edns=0)
    query.question[0].rdtype = dns.rdatatype.from_text(kind)
    reply = await dns.asyncquery.udp(query, "127.0.0.1", port=world.port, source=AGENT, timeout=5)
    assert reply.rcode() == dns.rcode.NOERROR
    assert len(reply.answer) == count
    assert (extended_error(reply)[0] if reply.options else -1) == code
    assert world.resolver.asked == []
    if kind == "ANY":
        assert reply.answer[0].to_text().endswith('HINFO "RFC8482" ""')
    else:
        assert reply.authority[0].rdtype == dns.rdatatype.SOA


async def test_https_records_lose_what_goes_around_us(world: World) -> None:
    """ech and the address hints are removed, also from the mandatory list; the rest stays."""
    reply = await world.ask("svc.example.com", "HTTPS")
    assert reply.answer[0].to_text() == 'svc.example.com. 60 IN HTTPS 1 . mandatory="alpn" alpn="h2"'


async def test_https_that_cannot_be_read_is_no_data(world: World) -> None:
    """A broken HTTPS record is NOERROR without data."""

    def broken(query: dns.message.Message, transport: str) -> bytes:
        name = b"\xc0\x0c" + struct.pack("!HHIH", 65, 1, 60, 3) + b"\0\1\xff"
        raw = bytearray(dns.message.make_response(query).to_wire())
        opt = raw[-11:]
        raw[6:8] = b"\0\1"
        return bytes(raw[:-11] + name + opt)

    world.resolver.hook = broken
    reply = await world.ask("svc.example.com", "HTTPS")
    assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])


async def test_other_types_are_passed_on(world: World) -> None:
    """MX of an allowed name comes as it is; a name that does not exist is NXDOMAIN with our SOA."""
    assert (await world.ask("mail.example.com", "MX")).answer[
        0
    ].to_text() == "mail.example.com. 60 IN MX 10 mx.example.com."
    gone = await world.ask("gone.example.com")
    assert (gone.rcode(), gone.authority[0][0].mname.to_text()) == (dns.rcode.NXDOMAIN, "clawker.")
    assert (world.records[-1].verdict, world.records[-1].rcode) == ("allowed", 3)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("clawker-controlplane", "198.51.100.2"),
        ("host.docker.internal", "198.51.100.3"),
        ("gateway.docker.internal", "198.51.100.1"),
        ("prometheus", None),
        ("other.docker.internal", None),
        ("docker.internal", None),
    ],
)
async def test_reserved_names(world: World, name: str, address: str | None) -> None:
    """Reserved names are answered here for every agent, with or without rules, and are never asked for."""
    for client in (AGENT, OTHER):
        reply = await world.ask(name, client=client)
        assert addresses(reply) == ([address] if address else [])
        if address is None:
            assert reply.rcode() == dns.rcode.NXDOMAIN
            assert "reserved" in extended_error(reply)[1]
    assert (await world.ask("clawker-controlplane", "AAAA")).rcode() == dns.rcode.NOERROR
    assert world.resolver.asked == []


async def test_quarantine(world: World) -> None:
    """A quarantined agent resolves the control plane and nothing else, bypass or not."""
    world.agents[AGENT].quarantined = world.agents[AGENT].bypassed = True
    assert (await world.ask("api.example.com")).rcode() == dns.rcode.NXDOMAIN
    assert (await world.ask("host.docker.internal")).rcode() == dns.rcode.NXDOMAIN
    assert addresses(await world.ask("clawker-controlplane")) == ["198.51.100.2"]


async def test_bypass(world: World) -> None:
    """While it lasts every public name resolves, recorded as bypassed, without rows; never private ones (R15, R12)."""
    world.agents[OTHER].bypassed = True
    assert addresses(await world.ask("api.example.com", client=OTHER)) == ["203.0.113.7"]
    assert world.records[-1].verdict == "bypassed"
    assert world.kernel.rows == {}
    assert (await world.ask("rebind.example.com", client=OTHER)).rcode() == dns.rcode.NXDOMAIN
    world.agents[OTHER].bypassed = False
    assert (await world.ask("api.example.com", client=OTHER)).rcode() == dns.rcode.NXDOMAIN


async def test_policy_that_changes_while_a_forwarder_is_asked(world: World) -> None:
    """The verdict that counts is the one at the time of the answer."""
    world.resolver.held = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(world.ask("api.example.com"))
        async with asyncio.timeout(5):
            while not world.resolver.asked:
                await asyncio.sleep(0)
        del world.policies.exact[2]["api.example.com"]
        world.policies.changed()
        world.resolver.held.set()
    assert asked.result().rcode() == dns.rcode.NXDOMAIN
    assert world.kernel.rows == {}


async def test_single_flight(world: World) -> None:
    """The same question of many clients leaves once."""
    world.resolver.held = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(world.ask("short.example.com")) for _ in range(20)]
        async with asyncio.timeout(5):
            while world.gate.statistics().waiting < 20:
                await asyncio.sleep(0)
        world.resolver.held.set()
    assert {tuple(addresses(task.result())) for task in asked} == {("203.0.113.8",)}
    assert len(world.resolver.asked) == 1
    await world.ask("short.example.com")
    assert len(world.resolver.asked) == 2, "a TTL of 0 is not kept"


async def test_names_that_need_the_proxy(world: World) -> None:
    """A name without listeners waits for them, and goes out under the identity it got."""

    def live(policy: int, name: str) -> None:
        world.policies.exact[2][name] = NameVerdict(True, identity=512, zone="wild.example")
        world.policies.changed()

    world.policies.below[2]["wild.example"] = NameVerdict(True, zone="wild.example", concrete=True)
    world.policies.changed()
    world.policies.on_prepare = live
    assert addresses(await world.ask("a.wild.example")) == ["203.0.113.20"]
    assert world.policies.prepared == [(2, "a.wild.example")]
    assert world.kernel.rows[7, mapped("203.0.113.20")].identity == 512


@pytest.mark.parametrize("failure", [Unavailable("the proxy is down"), None])
async def test_proxy_that_does_not_become_ready(world: World, failure: Exception | None) -> None:
    """If the proxy cannot serve the name, or never does, the answer is SERVFAIL and nothing is written."""

    def fail(policy: int, name: str) -> None:
        if failure is not None:
            raise failure

    world.policies.exact[2]["api.example.com"] = NameVerdict(True, san="*.example.com")
    world.policies.on_prepare = fail
    reply = await world.ask("api.example.com")
    assert reply.rcode() == dns.rcode.SERVFAIL
    assert world.records[-1].reason == "proxy_not_ready"
    assert world.kernel.rows == {}
