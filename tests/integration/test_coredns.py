"""
The real CoreDNS as the gate's child: zones, times, dead forwarders, what clients forge, and its own death.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import dns.asyncquery
import dns.edns
import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from clawker_cp.dns import Gate, GateSettings
from clawker_cp.dns.coredns import CoreDnsPlace, corefile
from clawker_cp.firewall.plan import IDENTITY_HTTP, NameVerdict
from clawker_cp.processes.coredns import CoreDnsChild
from clawker_cp.testing.authority_world import free_ports
from clawker_cp.testing.dns_world import FakeAgent, FakeAgents, FakeKernel, FakePolicies, RecordList, Resolver
from clawker_cp.testing.peers import WHY, peer

BINARY = peer("coredns")
pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(60), pytest.mark.skipif(BINARY is None, reason=WHY.format(name="coredns")),
]  # fmt: skip

AGENT, HOST = "127.0.0.2", "127.0.0.1"
ALLOWED = NameVerdict(True, rule_id="r1", identity=IDENTITY_HTTP)
API, DATABASE, LAB = "api.example.com", "db.corp.example", "db.lab.corp.example"
LIMIT_S = 20


class Fronted:
    """A gate with one CoreDNS behind it, and three resolvers behind that: everybody's, a zone's, and one's inside."""

    def __init__(self, directory: Path) -> None:
        self.everybodys = Resolver({
            (API, "A"): ["@ 60 A 203.0.113.7"],
            ("second.example.com", "A"): ["@ 1 A 203.0.113.8"],
            ("zero.example.com", "A"): ["@ 0 A 203.0.113.9"],
        })  # fmt: skip
        self.corps = Resolver({(DATABASE, "A"): ["@ 60 A 10.9.9.9"]})
        self.labs = Resolver({(LAB, "A"): ["@ 60 A 10.8.8.8"]})
        self.corp_serves = AsyncExitStack()
        self.kernel = FakeKernel()
        self._directory = directory

    async def start(self, group: asyncio.TaskGroup, opened: AsyncExitStack) -> None:
        assert BINARY is not None
        await opened.enter_async_context(self.everybodys.serve())
        await opened.enter_async_context(self.labs.serve())
        await opened.enter_async_context(self.corp_serves)
        await self.corp_serves.enter_async_context(self.corps.serve())
        zones = {"corp.example": (self.corps.address,), "lab.corp.example": (self.labs.address,)}
        place = CoreDnsPlace(HOST, *free_ports(3))
        self.port = place.port
        self.child = CoreDnsChild(
            BINARY,
            self._directory / "coredns" / "Corefile",
            corefile((self.everybodys.address,), zones, place),
            f"http://{HOST}:{place.health_port}/health",
        )
        opened.callback(group.create_task(self.child.run(), name="coredns").cancel)
        self.gate = Gate(
            GateSettings(
                address=HOST, port=-1, proxy_view_port=0, forwarders=(self.everybodys.address,), zones=zones,
                front=f"{HOST}:{place.port}", try_s=0.5,
            ),
            agents=FakeAgents({AGENT: FakeAgent()}),
            policies=FakePolicies({}, {2: {"example.com": ALLOWED, "corp.example": ALLOWED}}),
            kernel=self.kernel,
            records=RecordList(),
        )  # fmt: skip
        await self.gate.start(group)
        opened.push_async_callback(self.gate.aclose)
        await self.wait_running()

    async def wait_running(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not self.child.running:
                await asyncio.sleep(0.02)

    async def ask(self, name: str, *options: dns.edns.Option, port: int = 0) -> dns.message.Message:
        """Ask the gate as the agent, which has to ask somebody; or who listens at another port."""
        self.gate.flush_cache()
        query = dns.message.make_query(name, "A", use_edns=0, options=list(options))
        return await dns.asyncquery.udp(query, HOST, port=port or self.gate.port, source=AGENT, timeout=LIMIT_S)

    def pid(self) -> int:
        """CoreDNS's process, found by the Corefile that it alone was started with."""
        mine = f"/proc/self/task/{os.getpid()}/children"
        return next(
            int(pid)
            for pid in Path(mine).read_text().split()
            if str(self._directory) in Path(f"/proc/{pid}/cmdline").read_text()
        )


@pytest.fixture
async def fronted(tmp_path: Path) -> AsyncIterator[Fronted]:
    made = Fronted(tmp_path)
    async with asyncio.TaskGroup() as group, AsyncExitStack() as opened:
        await made.start(group, opened)
        yield made


def addresses(reply: dns.message.Message) -> list[str]:
    return [str(item) for rrset in reply.answer for item in rrset if item.rdtype == dns.rdatatype.A]


def extended_error(reply: dns.message.Message) -> tuple[int, str]:
    (option,) = (one for one in reply.options if isinstance(one, dns.edns.EDEOption))
    return option.code, option.text or ""


def asked(resolver: Resolver) -> list[str]:
    """Names that it was asked for, without the questions by which CoreDNS looks whether it lives."""
    return [name.lower().rstrip(".") for name, _, _ in resolver.asked if name != "."]


async def test_each_zone_is_asked_of_its_own(fronted: Fronted) -> None:
    """The longest zone wins, nobody is asked for another's name, and what CoreDNS holds is asked for once."""
    for name, address in ((API, "203.0.113.7"), (DATABASE, "10.9.9.9"), (LAB, "10.8.8.8")) * 2:
        assert addresses(await fronted.ask(name)) == [address]

    assert asked(fronted.everybodys) == [API]
    assert asked(fronted.corps) == [DATABASE]
    assert asked(fronted.labs) == [LAB]


async def test_answers_are_held_as_long_as_they_say(fronted: Fronted) -> None:
    """One second is one second, none is none, and a negative answer is not held at all."""
    for _ in range(2):
        assert addresses(await fronted.ask("zero.example.com")) == ["203.0.113.9"]
        assert (await fronted.ask("none.example.com")).rcode() == dns.rcode.NXDOMAIN
    began, lives = time.monotonic(), []
    async with asyncio.timeout(LIMIT_S):
        while asked(fronted.everybodys).count("second.example.com") < 2:
            lives.append((await fronted.ask("second.example.com")).answer[0].ttl)
            await asyncio.sleep(0.02)
    took_s = time.monotonic() - began

    assert asked(fronted.everybodys).count("zero.example.com") == 2
    assert asked(fronted.everybodys).count("none.example.com") == 2
    assert set(lives) <= {0, 1} and len(lives) > 2
    assert 0.5 < took_s < 4  # CoreDNS's own least is 5 s


async def test_a_dead_forwarder_is_said_and_harms_no_other(fronted: Fronted) -> None:
    """With its port closed its zone is SERVFAIL with the reason; other names are answered, and only those get rows."""
    await fronted.corp_serves.aclose()
    failed = await fronted.ask(DATABASE)
    others = [addresses(await fronted.ask(name)) for name in (API, LAB)]

    assert (failed.rcode(), extended_error(failed)) == (dns.rcode.SERVFAIL, (22, "clawker: no forwarder answered"))
    assert failed.answer == [] and others == [["203.0.113.7"], ["10.8.8.8"]]
    assert len(fronted.kernel.rows) == 2


async def test_a_silent_forwarder_is_asked_again(fronted: Fronted) -> None:
    """It costs its zone a SERVFAIL in limited time, and nothing any more once it answers."""
    fronted.corps.silent = True
    failed = await fronted.ask(DATABASE)
    other = await fronted.ask(API)
    fronted.corps.silent = False
    again = await fronted.ask(DATABASE)

    assert (failed.rcode(), extended_error(failed)) == (dns.rcode.SERVFAIL, (22, "clawker: no forwarder answered"))
    assert addresses(other) == ["203.0.113.7"]
    assert addresses(again) == ["10.9.9.9"]


async def test_what_an_agent_forges_goes_no_further(fronted: Fronted) -> None:
    """Client subnets and other options end at the gate, and a question with two OPT records is none."""
    seen: list[dns.message.Message] = []

    def note(query: dns.message.Message, _transport: str) -> bytes:
        seen.append(query)
        return fronted.everybodys.reply(query).to_wire()

    fronted.everybodys.hook = note
    forged = (dns.edns.ECSOption("198.51.100.99", 32), dns.edns.ECSOption("10.0.0.1", 32))
    answered = await fronted.ask(API, *forged, dns.edns.GenericOption(dns.edns.OptionType.make(65001), b"policy 1"))
    through = [option for query in seen if query.question[0].name != dns.name.root for option in query.options]
    twice = dns.message.make_query("second.example.com", "A", use_edns=0, options=list(forged[:1])).to_wire()
    opt = twice[-23:]
    double = twice[:10] + b"\0\2" + twice[12:] + opt
    refused = await _send(double, fronted.gate.port)
    after = await fronted.ask(API)

    assert opt[:3] == b"\0\0\x29"
    assert addresses(answered) == addresses(after) == ["203.0.113.7"]
    assert through == [] and fronted.child.restarts == 0
    assert refused[3] & 15 == dns.rcode.FORMERR
    assert "second.example.com" not in asked(fronted.everybodys)


async def _send(octets: bytes, port: int) -> bytes:
    """What comes back for octets that no library would write."""
    answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    class Once(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: object) -> None:
            answer.set_result(data)

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        Once, local_addr=(AGENT, 0), remote_addr=(HOST, port)
    )
    transport.sendto(octets)
    try:
        async with asyncio.timeout(LIMIT_S):
            return await answer
    finally:
        transport.close()


async def test_its_death_opens_nothing_and_passes(fronted: Fronted) -> None:
    """Killed, allowed names are asked of the forwarders, others stay denied with their reason, and it comes back."""
    os.kill(fronted.pid(), signal.SIGKILL)
    allowed = [addresses(await fronted.ask(name)) for name in (API, DATABASE, LAB)]
    denied = await fronted.ask("evil.example.org")
    rows = len(fronted.kernel.rows)
    async with asyncio.timeout(LIMIT_S):
        while not fronted.child.restarts:
            await asyncio.sleep(0.02)
    await fronted.wait_running()
    back = await fronted.ask(LAB, port=fronted.port)

    assert allowed == [["203.0.113.7"], ["10.9.9.9"], ["10.8.8.8"]]
    assert (denied.rcode(), extended_error(denied)[0], rows) == (dns.rcode.NXDOMAIN, 15, 3)
    assert "evil.example.org" not in asked(fronted.everybodys)
    assert addresses(back) == ["10.8.8.8"] and fronted.child.restarts == 1
