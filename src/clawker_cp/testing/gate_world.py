"""
One gate between agents at loopback addresses and a real resolver, on real sockets.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import dns.asyncquery
import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype

from clawker_cp.dns import Gate, GateSettings
from clawker_cp.firewall.plan import IDENTITY_HTTP, NameVerdict
from clawker_cp.testing.dns_world import FakeAgent, FakeAgents, FakeKernel, FakePolicies, RecordList, Resolver

AGENT, OTHER, STRANGER = "127.0.0.2", "127.0.0.3", "127.0.0.4"

RECORDS = {
    ("api.example.com", "A"): ["@ 600 CNAME edge.example.net.", "edge.example.net 40 A 203.0.113.7"],
    ("short.example.com", "A"): ["@ 0 A 203.0.113.8"],
    ("inside.example.com", "A"): ["@ 60 A 10.1.2.3", "@ 60 A 203.0.113.9"],
    ("rebind.example.com", "A"): ["@ 60 A 127.0.0.1", "@ 60 A 169.254.1.1"],
    ("host.example.com", "A"): ["@ 60 A 198.51.100.1"],
    ("txt.wild.example", "TXT"): ['@ 60 TXT "hello"'],
    ("a.wild.example", "A"): ["@ 60 A 203.0.113.20"],
    ("db.corp.example", "A"): ["@ 60 A 10.9.9.9"],
    ("svc.example.com", "HTTPS"): [
        "@ 60 HTTPS 1 . mandatory=alpn,ipv4hint alpn=h2 ipv4hint=203.0.113.1 ech=AAT+DQAA ipv6hint=2001:db8::1"
    ],
    ("many.example.com", "A"): [f"@ 60 A 203.0.113.{number}" for number in range(1, 101)],
    ("mail.example.com", "MX"): ["@ 60 MX 10 mx.example.com."],
}
ALLOWED = NameVerdict(True, rule_id="r1", identity=IDENTITY_HTTP)
WILD = NameVerdict(True, rule_id="r2", identity=300, zone="wild.example")
NAMES = ["api", "short", "inside", "rebind", "host", "svc", "many", "mail", "gone", "private"]
EXACT = {f"{name}.example.com": ALLOWED for name in NAMES}
EXACT["denied.wild.example"] = NameVerdict(False, "rule_deny", "r9")


class World:
    """One gate and all that it needs."""

    def __init__(self) -> None:
        self.resolver = Resolver(RECORDS)
        self.agents = FakeAgents({AGENT: FakeAgent(), OTHER: FakeAgent(cgroup_id=8, key="agent:p/b", policy=3)})
        self.policies = FakePolicies({2: dict(EXACT)}, {2: {"wild.example": WILD, "corp.example": ALLOWED}})
        self.kernel = FakeKernel()
        self.records = RecordList()
        self.gate: Gate
        self.port = 0

    async def ask(
        self, name: str, kind: str = "A", *, client: str = AGENT, tcp: bool = False, port: int = 0, **options: Any
    ) -> dns.message.Message:
        query = dns.message.make_query(name, kind, use_edns=options.pop("use_edns", 0), **options)
        transport = dns.asyncquery.tcp if tcp else dns.asyncquery.udp
        return await transport(query, "127.0.0.1", port=port or self.port, source=client, timeout=5)


@asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[World]:
    world = World()
    async with world.resolver.serve(), asyncio.TaskGroup() as group:
        options: dict[str, Any] = {
            "address": "127.0.0.1", "port": -1, "proxy_view_port": -1, "forwarders": (world.resolver.address,),
            "control_plane_address": "198.51.100.2", "host_proxy_address": "198.51.100.3",
            "gateway_address": "198.51.100.1", "try_s": 0.3,
        }  # fmt: skip
        world.gate = Gate(
            GateSettings(**(options | changes)),
            agents=world.agents,
            policies=world.policies,
            kernel=world.kernel,
            records=world.records,
        )
        await world.gate.start(group)
        world.port = world.gate.port
        try:
            yield world
        finally:
            if world.resolver.held is not None:
                world.resolver.held.set()
            await world.gate.aclose()


def extended_error(reply: dns.message.Message) -> tuple[int, str]:
    option = reply.options[0]
    assert isinstance(option, dns.edns.EDEOption)
    return int(option.code), option.text or ""


def mapped(address: str) -> bytes:
    return bytes(10) + b"\xff\xff" + ipaddress.ip_address(address).packed


def addresses(reply: dns.message.Message) -> list[str]:
    return [rdata.address for found in reply.answer for rdata in found if found.rdtype == dns.rdatatype.A]
