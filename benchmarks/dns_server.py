"""
One server per benchmark process: the gate, the real CoreDNS with the same zones, or a bare UDP echo as a loop's
ceiling; and the resolver both ask, which knows every name.

Run as `python dns_server.py WHAT {uvloop|asyncio} ADDRESS [COREDNS DIRECTORY]`, what = gate, coredns, echo, resolver;
prints `ready` when it listens, and its statistics when its standard input ends.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections import deque
from pathlib import Path

import uvloop

from clawker_cp.dns import BudgetSettings, DnsRecord, Gate, GateSettings
from clawker_cp.firewall.plan import IDENTITY_HTTP, NameVerdict
from clawker_cp.testing.dns_world import FakeAgent, FakeAgents, FakeKernel, FakePolicies

NAMES = 1000
RESOLVER = "127.0.0.1:5300"
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


class AnswersAll(asyncio.DatagramProtocol):
    """A resolver at the price of an echo: every name has one address."""

    RECORD = b"\xc0\x0c\0\1\0\1\0\0\x0e\x10\0\4\xcb\0\x71\7"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Repeat the question and add the record."""
        end = data.index(b"\0", 12) + 5
        answer = data[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + data[12:end] + self.RECORD
        self._transport.sendto(answer, addr)  # type: ignore[attr-defined]


async def wait_for_end() -> None:
    """Return when standard input is closed."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def serve_echo(protocol: type[asyncio.DatagramProtocol], address: str, port: int) -> None:
    """Answer datagrams until the end."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(protocol, local_addr=(address, port))
    print("ready", flush=True)
    await wait_for_end()
    transport.abort()


COREFILE = """
example.com:53 {{
  bind {address}
  hosts {hosts}
}}
wild.example:53 {{
  bind {address}
  cache
  forward . {upstream}
}}
.:53 {{
  bind {address}
  template ANY ANY {{
    rcode NXDOMAIN
  }}
}}
"""


async def serve_coredns(address: str, binary: str, directory: Path) -> None:
    """The same zones from CoreDNS: names from a file, a wildcard forwarded to the same resolver, NXDOMAIN else."""
    hosts, corefile = directory / "hosts", directory / "Corefile"
    hosts.write_text("".join(f"203.0.113.7 host-{number}.example.com\n" for number in range(NAMES)))
    corefile.write_text(COREFILE.format(address=address, hosts=hosts, upstream=RESOLVER))
    process = await asyncio.create_subprocess_exec(
        binary, "-conf", str(corefile), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(answers, address):  # noqa: ASYNC110 - somebody else's server
                await asyncio.sleep(0.05)
        print("ready", flush=True)
        await wait_for_end()
        print("CoreDNS")
    finally:
        process.terminate()
        await process.wait()


def answers(address: str) -> bool:
    """Whether somebody answers a question there."""
    question = b"\0\1\1\0\0\1\0\0\0\0\0\0\6host-1\7example\3com\0\0\1\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(0.2)
        try:
            asking.sendto(question, (address, 53))
            return bool(asking.recv(512))
        except OSError:
            return False


async def serve_gate(address: str) -> None:
    """Serve 1,000 exact names, a wildcard, and denials for the rest."""
    names = [f"host-{number}.example.com" for number in range(NAMES)]
    below = {"wild.example": NameVerdict(True, identity=300)}
    exact = {name: NameVerdict(True, identity=IDENTITY_HTTP) for name in names}
    policies = FakePolicies({2: exact}, {2: below})
    async with asyncio.TaskGroup() as group:
        gate = Gate(
            GateSettings(
                address=address,
                proxy_view_port=0,
                forwarders=(RESOLVER,),
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
    what, loop_name, where, *more = sys.argv[1:]
    factory = uvloop.new_event_loop if loop_name == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        if what == "coredns":
            runner.run(serve_coredns(where, more[0], Path(more[1])))
        elif what == "gate":
            runner.run(serve_gate(where))
        elif what == "resolver":
            runner.run(serve_echo(AnswersAll, "127.0.0.1", int(RESOLVER.rpartition(":")[2])))
        else:
            runner.run(serve_echo(Echo, where, 53))
