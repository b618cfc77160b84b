"""
One server per benchmark process: the gate, or a bare UDP echo as the ceiling of its loop.

Run as `python dns_server.py {gate|echo} {uvloop|asyncio} ADDRESS`; prints `ready` when it listens and
its statistics when its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque

import uvloop

from clawker_cp.dns import BudgetSettings, DnsRecord, Gate, GateSettings
from clawker_cp.firewall.plan import IDENTITY_HTTP, NameVerdict
from clawker_cp.testing.dns_world import FakeAgent, FakeAgents, FakeKernel, FakePolicies, Resolver

NAMES = 1000
CLIENT = "198.51.100.2"


class Latest(deque[DnsRecord]):
    """A sink that holds as many records as the memory of flows holds of one agent."""

    def dns(self, record: DnsRecord) -> None:
        """Keep the record, drop the oldest."""
        self.append(record)


class Echo(asyncio.DatagramProtocol):
    """Send back what comes: what the loop and the kernel cost without us."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Turn the query bit around, so that dnsperf counts it as an answer."""
        self._transport.sendto(data[:2] + b"\x80" + data[3:], addr)  # type: ignore[attr-defined]


async def wait_for_end() -> None:
    """Return when standard input is closed."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def serve_echo(address: str) -> None:
    """Echo until the end."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Echo, local_addr=(address, 53))
    print("ready", flush=True)
    await wait_for_end()
    transport.abort()


async def serve_gate(address: str) -> None:
    """Serve 1,000 exact names, a wildcard, and denials for the rest, with a resolver in the same process."""
    names = [f"host-{number}.example.com" for number in range(NAMES)]
    records = {(name, "A"): ["@ 3600 CNAME edge.example.net.", "edge.example.net 3600 A 203.0.113.7"] for name in names}
    resolver = Resolver(records)
    resolver.hook = None
    below = {"wild.example": NameVerdict(True, identity=300)}
    exact = {name: NameVerdict(True, identity=IDENTITY_HTTP) for name in names}
    policies = FakePolicies({2: exact}, {2: below})
    async with resolver.serve(), asyncio.TaskGroup() as group:
        gate = Gate(
            GateSettings(
                address=address,
                proxy_view_port=0,
                forwarders=(resolver.address,),
                budget=BudgetSettings(0, 0, 0),
                waiting_per_agent=1024,
            ),
            agents=FakeAgents({CLIENT: FakeAgent()}),
            policies=policies,
            kernel=FakeKernel(),
            records=Latest(maxlen=4096),
        )
        await gate.start(group)
        print("ready", flush=True)
        await wait_for_end()
        print(gate.statistics(), flush=True)
        await gate.aclose()


if __name__ == "__main__":
    what, loop_name, where = sys.argv[1:]
    factory = uvloop.new_event_loop if loop_name == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve_gate(where) if what == "gate" else serve_echo(where))
