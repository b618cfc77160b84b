"""
What a DNS gate needs around it in tests: a resolver with a zone, agents, policies, a kernel, a sink.

The resolver is a real server on real sockets; the rest are small in-memory objects that fit the
gate's protocols.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from clawker_cp.accel import NameMatcher
from clawker_cp.dns import DnsRecord, NameRow
from clawker_cp.firewall.plan import NameVerdict

NOT_ALLOWED = NameVerdict(False, "not_allowed")
Answers = Mapping[tuple[str, str], Sequence[str]]
Hook = Callable[[dns.message.Message, str], bytes | None]


class Resolver:
    """
    A recursive resolver that knows only its `records`: (name, type) -> texts in order "TTL TYPE DATA" of the answer.

    `silent`, `rcode` and `hook` make it misbehave; `asked` lists the questions as spelled, per transport.
    """

    def __init__(self, records: Answers | None = None) -> None:
        self.records: dict[tuple[str, str], Sequence[str]] = dict(records or {})
        self.asked: list[tuple[str, str, str]] = []
        self.silent = False
        self.rcode: int | None = None
        self.truncate = False
        self.lower_case = False
        self.ports: list[int] = []
        self.held: asyncio.Event | None = None
        self.hook: Hook | None = None
        self.address = ""

    @asynccontextmanager
    async def serve(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Resolver]:
        """Listen on UDP and TCP; `address` is what forwarders settings take."""
        loop = asyncio.get_running_loop()
        stream, datagram = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stream.bind((host, port))
        datagram.bind(stream.getsockname())
        stream.setblocking(False)
        datagram.setblocking(False)
        self.address = f"{host}:{stream.getsockname()[1]}"
        async with asyncio.TaskGroup() as group:
            transport, _ = await loop.create_datagram_endpoint(lambda: _ResolverUdp(self, group), sock=datagram)
            server = await asyncio.start_server(self._stream, sock=stream)
            try:
                yield self
            finally:
                if self.held is not None:
                    self.held.set()
                server.close()
                transport.abort()

    async def answer(self, data: bytes, transport: str) -> bytes | None:
        """Make the reply to one message."""
        query = dns.message.from_wire(data)
        self.asked.append(
            (query.question[0].name.to_text(), dns.rdatatype.to_text(query.question[0].rdtype), transport)
        )
        if self.held is not None:
            await self.held.wait()
        if self.silent:
            return None
        if self.hook is not None:
            return self.hook(query, transport)
        reply = self.reply(query)
        if self.truncate and transport == "udp":
            reply.answer.clear()
            reply.flags |= dns.flags.TC
        raw = reply.to_wire(max_size=65535)
        if self.lower_case:
            size = len(query.question[0].name.to_wire() or b"")
            raw = raw[:12] + raw[12 : 12 + size].lower() + raw[12 + size :]
        return raw

    def reply(self, query: dns.message.Message) -> dns.message.Message:
        """Look the question up."""
        question = query.question[0]
        name = question.name.to_text().lower().rstrip(".")
        reply = dns.message.make_response(query, recursion_available=True)
        if self.rcode is not None:
            reply.set_rcode(dns.rcode.Rcode(self.rcode))
            return reply
        found = self.records.get((name, dns.rdatatype.to_text(question.rdtype)))
        if found is None:
            if not any(known == name for known, _ in self.records):
                reply.set_rcode(dns.rcode.NXDOMAIN)
            reply.authority.append(dns.rrset.from_text(".", 60, "IN", "SOA", ". . 1 1 1 1 60"))
            return reply
        for text in found:
            owner, ttl, kind, data = text.split(" ", 3)
            reply.answer.append(dns.rrset.from_text(f"{name if owner == '@' else owner}.", int(ttl), "IN", kind, data))
        return reply

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            (size,) = struct.unpack("!H", await reader.readexactly(2))
            reply = await self.answer(await reader.readexactly(size), "tcp")
            if reply is not None:
                writer.write(struct.pack("!H", len(reply)) + reply)
                await writer.drain()
        except (EOFError, ConnectionError):
            pass
        finally:
            writer.close()


class _ResolverUdp(asyncio.DatagramProtocol):
    def __init__(self, resolver: Resolver, group: asyncio.TaskGroup) -> None:
        self._resolver = resolver
        self._group = group

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is none by inheritance

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._resolver.ports.append(addr[1])
        self._group.create_task(self._answer(data, addr))

    async def _answer(self, data: bytes, addr: tuple[str, int]) -> None:
        reply = await self._resolver.answer(data, "udp")
        if reply is not None:
            self._transport.sendto(reply, addr)


@dataclass
class FakeAgent:
    """An agent as the gate sees it."""

    cgroup_id: int = 7
    key: str = "agent:p/a"
    policy: int = 2
    bypassed: bool = False
    quarantined: bool = False


class FakeAgents(dict[str, FakeAgent]):
    """Agents by address."""

    def by_address(self, address: str) -> FakeAgent | None:
        """Return the agent of an address."""
        return self.get(address)


@dataclass
class FakePolicies:
    """Verdicts per policy: exact names and wildcard bases."""

    exact: dict[int, dict[str, NameVerdict]] = field(default_factory=dict)
    below: dict[int, dict[str, NameVerdict]] = field(default_factory=dict)
    prepared: list[tuple[int, str]] = field(default_factory=list)
    on_prepare: Callable[[int, str], None] = lambda policy, name: None
    _made: dict[int, tuple[NameMatcher, list[NameVerdict]]] = field(default_factory=dict)

    def changed(self) -> None:
        """Take changes of the tables over."""
        self._made.clear()

    def decide(self, policy: int, name: str) -> NameVerdict:
        """Judge a name."""
        if policy not in self._made:
            exact, below = self.exact.get(policy, {}), self.below.get(policy, {})
            verdicts = [*exact.values(), *below.values()]
            self._made[policy] = (
                NameMatcher(
                    {name: at for at, name in enumerate(exact)},
                    {name: at for at, name in enumerate(below, len(exact))},
                ),
                verdicts,
            )
        matcher, verdicts = self._made[policy]
        found = matcher.match(name)
        return verdicts[found] if found >= 0 else NOT_ALLOWED

    async def prepare(self, policy: int, name: str, verdict: object) -> None:
        """Note the call and run the test's reaction."""
        self.prepared.append((policy, name))
        await asyncio.sleep(0)
        self.on_prepare(policy, name)

    def for_proxy(self, name: str) -> NameVerdict | None:
        """Return the verdict of any policy that allows the name."""
        for policy in {*self.exact, *self.below}:
            verdict = self.decide(policy, name)
            if verdict.allowed:
                return verdict
        return None


class FakeKernel:
    """The name cache as rows by (agent, address); `refusal` is raised instead of writing."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, bytes], NameRow] = {}
        self.writes = 0
        self.refusal: Exception | None = None

    def update_dns(self, cgroup_id: int, rows: Sequence[NameRow]) -> None:
        """Write rows."""
        if self.refusal is not None:
            raise self.refusal
        self.writes += 1
        for row in rows:
            self.rows[cgroup_id, row.addr] = row


class RecordList(list[DnsRecord]):
    """A sink that keeps everything."""

    def dns(self, record: DnsRecord) -> None:
        """Keep one record."""
        self.append(record)
