"""The host ring: what leaves a sandbox's link, whatever made it (threats 4, 5, 11, 20, 36; layer B)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from clawker_cp.engines.base import Sandbox
from clawker_cp.engines.host import commands
from clawker_cp.engines.host.bubble import DOCKER_CAPABILITIES
from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.engines.host.network import mac_of
from clawker_cp.engines.host.ring import Direct
from clawker_cp.errors import DeadlineExceeded, Unavailable
from clawker_cp.testing.sandbox_world import (
    FAR,
    GATEWAY,
    HOST,
    WORLD,
    Host,
    eventually,
    running_host,
    sh,
    tcp_server,
    until,
)

pytestmark = [pytest.mark.root, pytest.mark.slow]

# Connects to each ADDRESS:PORT given and tells for each what happened, within half a second.
CONNECT = """
import socket, sys
for target in sys.argv[1:]:
    host, port = target.split(':')
    try:
        with socket.create_connection((host, int(port)), timeout=0.5) as s:
            s.sendall(b'x'); print(s.recv(100).decode().strip() or 'closed', flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""
ROOT = {"uid": 0, "gid": 0, "allow_root": True, "seccomp": False, "capabilities": DOCKER_CAPABILITIES}


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with running_host(tmp_path) as running:
        yield running


async def connect(host: Host, *targets: str, sandbox: Sandbox | None = None) -> list[str]:
    made = sandbox or await host.engine.create(host.spec("python3", "-c", CONNECT, *targets))
    code, output = await host.finish(made.id)
    await host.engine.remove(made.id, force=True, grace_s=0)
    assert code == 0, output
    return output.split()


async def test_only_the_gateways_tuples_are_reached(host: Host) -> None:
    """The agent's own listeners answer on the gateway; other ports, other listeners and other addresses do not."""
    closed = [f"{GATEWAY}:{port}" for port in (8080, 9902, 10001, 15000)] + [f"{HOST}:10000"]
    with contextlib.ExitStack() as stack:
        for target in (f"{GATEWAY}:10000", *closed):
            address, _, port = target.rpartition(":")
            stack.enter_context(tcp_server(address, int(port)))
        sandbox = await host.engine.create(host.spec("python3", "-c", CONNECT, f"{GATEWAY}:10000", *closed))
        await host.engine.ring.admit(sandbox.address, [], [(6, 10000)])
        answers = await connect(host, sandbox=sandbox)
    assert answers[0].startswith("10.231.")
    assert answers[1:] == ["TimeoutError"] * 5
    refused = await eventually(lambda: [event for event in host.events if event.destination_port == 8080], "the record")
    assert refused[0].reason == "no_route"
    assert refused[0].destination == GATEWAY
    assert refused[0].sandbox_id != ""


async def test_one_agent_cannot_take_all_connections_to_the_control_plane(host: Host) -> None:
    """Its 65th at once gets no answer and is recorded; another agent's are answered, and its own after it let go."""
    script = (
        "import socket\n"
        "def reached(held):\n"
        "    s = socket.socket(); s.settimeout(0.4); held.append(s)\n"
        f"    return s.connect_ex(('{GATEWAY}', 7444)) == 0\n"
        "held = []\n"
        "print(sum(reached(held) for _ in range(66)))\n"
        "for s in held: s.close()\n"
        "print(any(reached(held) for _ in range(20)))\n"
    )
    with tcp_server(GATEWAY, 7444):
        greedy = asyncio.create_task(host.run("python3", "-c", script))
        await eventually(lambda: [event for event in host.events if event.destination_port == 7444], "the record")
        other = await connect(host, f"{GATEWAY}:7444")
        code, said = await greedy
    assert (code, said.split()) == (0, ["64", "True"])
    assert other[0].startswith("10.231.")


async def test_pins_that_go_together_go_whole_or_each_caller_hears(host: Host) -> None:
    """Others keep theirs; where the table is missing every caller fails, and what failed is nobody else's later."""
    ring, sandboxes = host.engine.ring, [await host.engine.create(host.spec("true")) for _ in range(4)]
    for one in sandboxes:
        await ring.admit(one.address, [], [(6, 10000)])

    async def unpin(*which: Sandbox) -> list[BaseException | None]:
        going = [asyncio.ensure_future(ring.unpin(one.interface, one.address)) for one in which]
        await asyncio.wait(going)
        return [one.exception() for one in going]

    told = await unpin(*sandboxes[:3], sandboxes[0])
    left = sh("nft", "list", "table", "bridge", "clawker_cwtest0") + sh(
        "nft", "list", "table", "inet", "clawker_cwtest0"
    )
    sh("nft", "delete", "table", "inet", "clawker_cwtest0")
    failed = await unpin(*sandboxes[2:])
    await ring.install([(sandboxes[3].interface, sandboxes[3].address)])
    await unpin(sandboxes[0])
    still = sh("nft", "list", "table", "bridge", "clawker_cwtest0")

    assert told == [None] * 4
    assert [one.address in left for one in sandboxes] == [False, False, False, True]
    assert all(isinstance(one, Unavailable) for one in failed)
    assert sandboxes[3].interface in still


async def test_world_is_closed_until_admitted_and_then_sees_the_host(host: Host) -> None:
    """A direct path is closed by default, opens for exactly its ports, leaves masqueraded, and closes again."""
    with (
        tcp_server(WORLD, 5432, host.world) as seen,
        tcp_server(WORLD, 5433, host.world),
        tcp_server(FAR, 5432, host.world),
    ):
        targets = (f"{WORLD}:5432", f"{WORLD}:5433", f"{FAR}:5432")
        assert await connect(host, *targets) == ["TimeoutError"] * 3
        sandbox = await host.engine.create(host.spec("python3", "-c", CONNECT, *targets))
        await host.engine.ring.admit(
            sandbox.address, [Direct("198.51.100.0/24", 6, 5000, 5432), Direct("198.51.100.1/32", 6, 5400, 5432)]
        )
        assert await connect(host, sandbox=sandbox) == [HOST, "TimeoutError", "TimeoutError"]
        assert set(seen) == {HOST}
        assert "198.51.100.0" not in sh("nft", "list", "ruleset")


async def test_what_an_unanswered_change_opened_is_closed_by_the_next(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that is applied and answers too late is not taken for one that was not."""
    sandbox = await host.engine.create(host.spec("python3", "-c", CONNECT, f"{GATEWAY}:10000"))
    await host.engine.ring.admit(sandbox.address, [], [(6, 10001)])
    late = tmp_path / "late" / "nft"
    late.parent.mkdir()
    late.write_text(f'#!/bin/sh\n{shutil.which("nft")} "$@"\nexec sleep 60\n')
    late.chmod(0o755)
    with monkeypatch.context() as slow, pytest.raises(DeadlineExceeded):
        slow.setenv("PATH", str(late.parent), prepend=os.pathsep)
        slow.setattr(commands, "LIMIT_S", 2.0)
        await host.engine.ring.admit(sandbox.address, [], [(6, 10000)])
    await host.engine.ring.admit(sandbox.address, [], [(6, 10001)])

    with tcp_server(GATEWAY, 10000):
        assert await connect(host, sandbox=sandbox) == ["TimeoutError"]


async def test_admission_that_is_taken_back_stops_an_open_flow(host: Host) -> None:
    """Packets of a connection stop passing when their destination is no longer admitted."""
    script = (
        "import socket; s = socket.create_connection(('198.51.100.1', 5432)); s.settimeout(0.7)\n"
        "s.sendall(b'x'); s.recv(100); print('up', flush=True); open('go').read()\n"
        "s.sendall(b'x')\n"
        "try: print(s.recv(100))\n"
        "except TimeoutError: print('stopped')\n"
    )
    os.mkfifo(host.workdir / "go")
    (host.workdir / "go").chmod(0o666)
    with tcp_server(WORLD, 5432, host.world):
        sandbox = await host.engine.create(host.spec("python3", "-c", script))
        await host.engine.ring.admit(sandbox.address, [Direct("198.51.100.1/32", 6, 5432, 5432)])
        output = host.workdir.parent / "flow"
        with output.open("w+b") as file:
            await host.engine.run(sandbox.id, (file.fileno(), file.fileno(), file.fileno()))
        until(lambda: "up" in output.read_text(), "the connection")
        await host.engine.ring.admit(sandbox.address, [])
        (host.workdir / "go").write_text("")
        assert await host.engine.wait(sandbox.id) == 0
    assert output.read_text().split() == ["up", "stopped"]


async def test_bypass_ends_by_the_kernels_clock_and_never_covers_what_is_reserved(host: Host) -> None:
    """Everything public opens for the time given, reserved networks and the host stay closed, and it ends by itself."""
    with tcp_server(WORLD, 80, host.world), tcp_server(FAR, 80, host.world), tcp_server(HOST, 80):
        script = CONNECT + f"import time; time.sleep(2.2)\nprint(*[socket.socket().connect_ex(('{WORLD}', 80))])\n"
        script = script.replace("socket.socket().connect_ex", "connect")
        script = (
            "import socket\ndef connect(to):\n  s = socket.socket(); s.settimeout(0.5); return s.connect_ex(to)\n"
            + script
        )
        sandbox = await host.engine.create(host.spec("python3", "-c", script, f"{WORLD}:80", f"{FAR}:80", f"{HOST}:80"))
        await host.engine.ring.reserve(["203.0.113.0/24"])
        await host.engine.ring.admit_all(sandbox.address, 2.0)
        answers = await connect(host, sandbox=sandbox)
    assert answers[:3] == [HOST, "TimeoutError", "TimeoutError"]
    assert answers[3] != "0"


async def test_siblings_never_meet(host: Host) -> None:
    """One sandbox reaches no port of another, neither by routing nor by frames on the bridge."""
    server = "import socket; s = socket.create_server(('0.0.0.0', 10000)); print('up', flush=True); s.accept()"
    other = await host.start("python3", "-c", server)
    until(lambda: "up" in host.output(other), "the server")
    address = host.engine.living()[0].address
    assert await connect(host, f"{address}:10000") == ["TimeoutError"]
    await host.engine.ring.admit_all(address, None)
    sandbox = await host.engine.create(host.spec("python3", "-c", CONNECT, f"{address}:10000"))
    await host.engine.ring.admit_all(sandbox.address, None)
    assert await connect(host, sandbox=sandbox) == ["TimeoutError"]


def frame(source: str, ether_type: int, payload: bytes, *, target: str = mac_of(GATEWAY)) -> str:
    octets = bytes.fromhex((target + source).replace(":", "")) + struct.pack(">H", ether_type) + payload
    return octets.hex()


def udp(source: str, destination: str, port: int = 53) -> bytes:
    body = struct.pack(">HHHH", 1000, port, 12, 0) + b"mark"
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 32, 1, 0, 64, 17, 0, socket.inet_aton(source), socket.inet_aton(destination)
    )
    total = sum(struct.unpack(">10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack(">H", checksum) + header[12:] + body


def arp(mac: str, address: str, operation: int = 2) -> bytes:
    sender = bytes.fromhex(mac.replace(":", "")) + socket.inet_aton(address)
    return struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation) + sender + bytes(6) + socket.inet_aton(GATEWAY)


async def test_forged_frames_end_at_the_link(host: Host) -> None:
    """With raw sockets, no frame passes with another's addresses, a tag, IPv6 or a strange type; each kind is told."""
    victim = await host.engine.create(host.spec("true"))
    sandbox = await host.engine.create(
        host.spec(
            "python3", "-c",
            "import socket, sys\ns = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(('eth0', 0))\n"
            "for f in open('frames').read().split(): s.send(bytes.fromhex(f))\n",
            **ROOT,
        )
    )  # fmt: skip
    mac, address, theirs = mac_of(sandbox.address), sandbox.address, mac_of(victim.address)
    good = udp(address, GATEWAY)
    tagged = struct.pack(">HH", 5, 0x0800) + good
    forged = {
        "other address": frame(mac, 0x0800, udp(victim.address, GATEWAY)),
        "other mac": frame(theirs, 0x0800, good),
        "other both": frame(theirs, 0x0800, udp(victim.address, GATEWAY)),
        "gateway's address": frame(mac, 0x0800, udp(GATEWAY, GATEWAY)),
        "no address": frame(mac, 0x0800, udp("0.0.0.0", "255.255.255.255", 67), target="ff:ff:ff:ff:ff:ff"),
        "priority tag": frame(mac, 0x8100, struct.pack(">HH", 0, 0x0800) + good),
        "tag": frame(mac, 0x8100, tagged),
        "service tag": frame(mac, 0x88A8, tagged),
        "two tags": frame(mac, 0x8100, struct.pack(">HH", 5, 0x8100) + tagged),
        "ipv6": frame(mac, 0x86DD, b"\x60" + bytes(59)),
        "router advertisement": frame(
            mac, 0x86DD, b"\x60" + bytes(39) + b"\x86" + bytes(15), target="33:33:00:00:00:01"
        ),
        "arp of another": frame(mac, 0x0806, arp(theirs, victim.address)),
        "arp of the gateway": frame(mac, 0x0806, arp(mac, GATEWAY), target="ff:ff:ff:ff:ff:ff"),
        "arp under another mac": frame(theirs, 0x0806, arp(mac, address)),
        "lldp": frame(mac, 0x88CC, bytes(50), target="01:80:c2:00:00:0e"),
        "spanning tree": frame(mac, 0x0026, bytes(38), target="01:80:c2:00:00:00"),
        "mpls": frame(mac, 0x8847, bytes(50)),
    }
    honest = frame(mac, 0x0800, good)
    (host.workdir / "frames").write_text("\n".join([*forged.values(), honest]))
    listeners = {}
    for name, namespace in (("bridge", None), ("victim", Path("/run/netns", victim.netns))):
        sniffer = in_netns(namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        sniffer.bind(("cwtest0" if name == "bridge" else "eth0", 3))
        sniffer.setblocking(False)
        listeners[name] = sniffer
    try:
        code, output = await host.finish(sandbox.id)
        assert code == 0, output
        # The honest frame was sent last on the same link: once it is here, the others would be too.
        arrived: list[bytes] = []

        def honest_arrived() -> bool:
            arrived.extend(_received(listeners["bridge"]))
            return any(octets.hex() == honest for octets in arrived)

        until(honest_arrived, "the honest frame")
        from_sandbox = [octets for octets in arrived if octets[6:12].hex() != mac_of(GATEWAY).replace(":", "")]
        assert [octets.hex() for octets in from_sandbox] == [honest]
        assert _received(listeners["victim"]) == []
    finally:
        for sniffer in listeners.values():
            sniffer.close()
    assert theirs in sh("ip", "neigh", "show", victim.address)
    await eventually(lambda: len(host.events) >= len(forged) - 2, f"the records: {len(host.events)}")
    assert {event.sandbox_id for event in host.events} == {sandbox.id}
    assert {event.reason for event in host.events} == {"malformed", "ipv6_unrouted", "protocol"}


def _received(sniffer: socket.socket) -> list[bytes]:
    frames = []
    while True:
        try:
            frames.append(sniffer.recv(2000))
        except BlockingIOError:
            return frames


async def test_flood_of_drops_is_reported_by_samples(host: Host) -> None:
    """Thousands of dropped packets make tens of records: the budget is per link."""
    script = (
        "import socket\ns = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(('eth0', 0))\n"
        "for _ in range(3000): s.send(bytes(6) + s.getsockname()[4] + b'\\x88\\xcc' + bytes(50))\n"
    )
    assert (await host.run("python3", "-c", script, **ROOT))[0] == 0
    await eventually(lambda: host.events, "a record")
    assert len(host.events) < 200


async def test_host_that_did_not_forward_forwards_for_agents_only(tmp_path: Path) -> None:
    """Starting the engine does not make the host a router for its neighbours, and ending it restores the setting."""
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    async with running_host(tmp_path) as host:
        await host.engine.aclose(remove=True)
        forward.write_text("0")
        await host.engine.start()
        assert forward.read_text() == "1\n"
        sh("ip", "-n", host.world.name, "route", "add", "192.0.2.0/24", "via", HOST)
        sh("ip", "link", "add", "lan0", "type", "bridge")
        sh("ip", "addr", "add", "192.0.2.254/24", "dev", "lan0")
        sh("ip", "link", "set", "lan0", "up")
        with in_netns(host.world, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.sendto(b"x", ("192.0.2.7", 9))
        # The local wire is synchronous: had it passed, the host would be asking for the neighbour now.
        assert sh("ip", "neigh", "show", "dev", "lan0") == ""
        await host.engine.aclose(remove=True)
        assert forward.read_text() == "0\n"
        await host.engine.start()


async def test_ring_of_another_version_is_replaced_without_a_gap(host: Host) -> None:
    """Sets that cannot be reshaped are made anew in one transaction, and living sandboxes keep their pins."""
    sandbox = await host.engine.create(host.spec("python3", "-c", CONNECT, f"{GATEWAY}:4444"))
    sh("nft", "delete", "table", "inet", "clawker_cwtest0")
    sh("nft", "add", "table", "inet", "clawker_cwtest0")
    sh("nft", "add", "set", "inet", "clawker_cwtest0", "everywhere", "{ type ether_addr; }")
    await host.engine.ring.install([(sandbox.interface, sandbox.address)], forwarded_before=True)
    with tcp_server(GATEWAY, 4444):
        assert await connect(host, sandbox=sandbox) == [sandbox.address]
