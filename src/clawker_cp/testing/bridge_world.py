"""
A host whose bridge has ports of any name, and containers without an engine, for tests of the Docker ring.

Each is a network namespace of its own; the outside owns 198.51.100.0/24 and 203.0.113.0/24 and has no way
further. The test's process stays where it is and makes its sockets inside; all ends with it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clawker_cp.engines.base import AgentNetwork, RingEvent
from clawker_cp.engines.docker.ports import Port, find_port
from clawker_cp.engines.docker.ring import DockerRing
from clawker_cp.engines.docker.ring_rules import Pin
from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.engines.host.nflog import RingLog
from clawker_cp.testing.world import HostNamespace

BRIDGE = "br-ckwtest"
SUBNET = "10.231.96.0/20"
GATEWAY = "10.231.96.1"
CP = "10.231.96.202"
PROXY = "10.231.96.200"
MONITOR = "10.231.96.210"
HOST, WORLD, FAR = "198.51.100.254", "198.51.100.1", "203.0.113.1"
PATIENCE_S = 0.4
ON_HOST = {"proxy": GATEWAY, "dns": GATEWAY, "cp": GATEWAY}
AS_CONTAINER = {"proxy": CP, "dns": CP, "cp": CP}


@dataclass
class Box:
    """A container without an engine: a process in a network namespace with a link to the bridge."""

    address: str
    mac: str
    process: subprocess.Popen[str]
    port: Port | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def netns(self) -> Path:
        return Path(f"/proc/{self.process.pid}/ns/net")

    @property
    def interface(self) -> str:
        assert self.port is not None
        return self.port.interface

    @property
    def pin(self) -> Pin:
        assert self.port is not None
        return Pin(self.port.interface, self.address, self.port.mac)

    def connect(self, address: str, port: int, source_port: int = 0) -> str:
        """What a TCP connection meets: the answer, or the error's name."""
        return in_netns(self.netns, lambda: connected(address, port, source_port))

    def raw(self) -> socket.socket:
        """A packet socket on the link, which takes whole frames."""

        def bound() -> socket.socket:
            packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            packets.bind(("eth0", 3))
            packets.setblocking(False)
            return packets

        return in_netns(self.netns, bound)

    def sh(self, *argv: str) -> str:
        return run("nsenter", "-t", str(self.pid), "-n", *argv)


def connected(address: str, port: int, source_port: int = 0) -> str:
    try:
        with socket.socket() as made:
            made.settimeout(PATIENCE_S)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(("", source_port))
            made.connect((address, port))
            made.sendall(b"x")
            return made.recv(100).decode().strip()
    except OSError as error:
        return type(error).__name__


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20).stdout


def hold(*argv: str) -> subprocess.Popen[str]:
    """A process that keeps namespaces, once it has them."""
    command = ["setpriv", "--pdeathsig", "KILL", *argv, "sh", "-c", "echo ready; exec sleep infinity"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """End what `hold` began."""
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@dataclass
class Yard:
    """A host with a bridge as Docker makes it, an outside, and boxes on the bridge."""

    host: HostNamespace
    network: AgentNetwork
    ring: DockerRing
    world: Path = Path()
    boxes: list[Box] = field(default_factory=list)
    events: list[RingEvent] = field(default_factory=list)
    held: list[subprocess.Popen[str]] = field(default_factory=list)

    def sh(self, *argv: str) -> str:
        return run("nsenter", "-t", str(self.host.pid), "-n", *argv)

    def box(self, last: int, *, name: str = "") -> Box:
        """Attach a container; its port is not pinned."""
        process = hold("unshare", "--net")
        self.held.append(process)
        address, mac = f"10.231.96.{last}", f"02:42:0a:e7:60:{last:02x}"
        end = name or f"veth{process.pid:x}"
        self.sh("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "address", mac, "netns",
                str(process.pid))  # fmt: skip
        self.sh("ip", "link", "set", end, "master", BRIDGE, "up")
        box = Box(address, mac, process)
        box.sh("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
        box.sh("ip", "addr", "add", f"{address}/20", "dev", "eth0")
        box.sh("ip", "link", "set", "lo", "up")
        box.sh("ip", "link", "set", "eth0", "up")
        box.sh("ip", "route", "add", "default", "via", GATEWAY)
        self.boxes.append(box)
        return box

    async def known(self, last: int) -> Box:
        box = self.box(last)
        box.port = await find_port(box.pid, BRIDGE, host_pid=self.host.pid)
        return box

    async def agent(self, last: int) -> Box:
        box = await self.known(last)
        await self.ring.pin(box.interface, box.address, mac=box.mac)
        return box

    async def ours(self, last: int) -> Box:
        box = await self.known(last)
        await self.ring.pin(box.interface, box.address, mac=box.mac, infrastructure=True)
        return box

    @staticmethod
    def readdress(box: Box, address: str) -> None:
        """Give a container another address, as a successor of a dead one gets it from the engine."""
        box.sh("ip", "addr", "flush", "dev", "eth0")
        box.sh("ip", "addr", "add", f"{address}/20", "dev", "eth0")
        box.sh("ip", "route", "replace", "default", "via", GATEWAY)

    def owner(self, index: int) -> str:
        return next((box.address for box in self.boxes if box.port and box.port.index == index), "")

    def from_host(self, address: str, port: int) -> str:
        return in_netns(self.host.netns, lambda: connected(address, port))


@contextlib.asynccontextmanager
async def yard(addresses: dict[str, str], *, bridged_calls: bool = False, **options: Any) -> AsyncIterator[Yard]:
    async with HostNamespace() as host:
        network = AgentNetwork(id="n", subnet=SUBNET, gateway=GATEWAY, bridge=BRIDGE, **addresses)
        made = Yard(host, network, DockerRing(network, host_pid=host.pid, **options))
        outside = hold("unshare", "--net")
        made.held.append(outside)
        made.world = Path(f"/proc/{outside.pid}/ns/net")
        made.sh("ip", "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0")
        made.sh("ip", "addr", "add", f"{GATEWAY}/20", "dev", BRIDGE)
        made.sh("ip", "link", "set", BRIDGE, "up")
        made.sh("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", str(outside.pid))
        made.sh("ip", "addr", "add", f"{HOST}/24", "dev", "up0")
        made.sh("ip", "link", "set", "up0", "up")
        made.sh("ip", "route", "add", "203.0.113.0/24", "via", WORLD)
        made.sh("sysctl", "-qw", f"net.bridge.bridge-nf-call-iptables={int(bridged_calls)}")
        made.sh("iptables", "-t", "nat", "-A", "POSTROUTING", "-s", SUBNET, "!", "-o", BRIDGE, "-j", "MASQUERADE")
        for command in ("addr add 198.51.100.1/24 dev up0", "link set up0 up", "link set lo up",
                        "addr add 203.0.113.1/32 dev lo", f"route add {SUBNET} via {HOST}"):  # fmt: skip
            run("nsenter", "-t", str(outside.pid), "-n", "ip", *command.split())
        log = RingLog(made.ring.group, made.owner, made.events.append, by_source=str, namespace=host.netns)
        try:
            await made.ring.install([])
            log.open()
            yield made
        finally:
            log.close()
            for process in made.held:
                end(process)


def frame(source: str, ether_type: int, payload: bytes, *, target: str) -> bytes:
    return bytes.fromhex((target + source).replace(":", "")) + struct.pack(">H", ether_type) + payload


def udp(source: str, destination: str, port: int = 53) -> bytes:
    body = struct.pack(">HHHH", 1000, port, 12, 0) + b"mark"
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 32, 1, 0, 64, 17, 0, socket.inet_aton(source), socket.inet_aton(destination)
    )
    total = sum(struct.unpack(">10H", header))
    return header[:10] + struct.pack(">H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + header[12:] + body


def arp(mac: str, address: str, target: str, operation: int = 2) -> bytes:
    sender = bytes.fromhex(mac.replace(":", "")) + socket.inet_aton(address)
    return struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation) + sender + bytes(6) + socket.inet_aton(target)


def six(kind: int, payload: bytes = bytes(20)) -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, "fe80::5") + socket.inet_pton(socket.AF_INET6, "fe80::6")
    return struct.pack(">IHBB", 0x60000000, len(payload), kind, 255) + ends + payload


def tag(kind: int, payload: bytes, identifier: int = 0) -> bytes:
    return struct.pack(">HH", identifier, kind) + payload


def received(packets: socket.socket) -> list[bytes]:
    frames = []
    while True:
        try:
            frames.append(packets.recv(2000))
        except BlockingIOError:
            return frames


def take(seen: list[bytes], packets: socket.socket) -> list[bytes]:
    """`seen`, and what has arrived since at its end."""
    seen.extend(received(packets))
    return seen


@contextlib.contextmanager
def listening(*places: Callable[[], socket.socket]) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(place()) for place in places]


def host_mac(made: Yard) -> str:
    return str(json.loads(made.sh("ip", "-j", "link", "show", "dev", BRIDGE))[0]["address"])
