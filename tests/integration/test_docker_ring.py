"""The ring around a bridge with foreign port names, on real links (threats 4, 5, 11, 14, 36; layer B)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.engines.docker.ports import PortWatch
from clawker_cp.engines.host.direct import Direct
from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.testing.bridge_world import (
    AS_CONTAINER,
    BRIDGE,
    CP,
    FAR,
    GATEWAY,
    HOST,
    MONITOR,
    ON_HOST,
    PROXY,
    WORLD,
    Box,
    Yard,
    arp,
    frame,
    host_mac,
    listening,
    received,
    six,
    tag,
    take,
    udp,
    yard,
)
from clawker_cp.testing.sandbox_world import eventually, tcp_server, until

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
async def hosted() -> AsyncIterator[Yard]:
    async with yard(ON_HOST) as made:
        yield made


def bridge_socket(made: Yard) -> socket.socket:
    """What the host's own stack is given from the bridge."""

    def bound() -> socket.socket:
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        packets.bind((BRIDGE, 3))
        packets.setblocking(False)
        return packets

    return in_netns(made.host.netns, bound)


def udp_socket(namespace: Path, address: str, port: int) -> socket.socket:
    def bound() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        made.bind((address, port))
        made.setblocking(False)
        return made

    return in_netns(namespace, bound)


def arrivals(forged: dict[str, bytes]) -> set[bytes]:
    """How frames look where they come in: a packet socket is given them without the outer tag."""
    return {*forged.values(), *(f[:12] + f[16:] for f in forged.values() if f[12:14] in {b"\x81\0", b"\x88\xa8"})}


def own(octets: bytes, box: Box) -> bool:
    """Whether a frame is ARP of the container's own kernel, for its own address."""
    return octets[12:14] == b"\x08\x06" and octets[22:32] == bytes.fromhex(box.mac.replace(":", "")) + socket.inet_aton(
        box.address
    )


def forgeries(box: Box, victim: Box, gateway_mac: str) -> dict[str, bytes]:
    """Frames that no pinned port may send, each to where it would do harm."""
    mac, address, theirs = box.mac, box.address, victim.mac
    good, everyone = udp(address, CP), "ff:ff:ff:ff:ff:ff"
    return {
        "other address": frame(mac, 0x0800, udp(victim.address, CP), target=everyone),
        "other mac": frame(theirs, 0x0800, good, target=everyone),
        "other both": frame(theirs, 0x0800, udp(victim.address, CP), target=everyone),
        "gateway's address": frame(mac, 0x0800, udp(GATEWAY, CP), target=everyone),
        "control plane's address": frame(mac, 0x0800, udp(CP, victim.address, 7700), target=theirs),
        "no address": frame(mac, 0x0800, udp("0.0.0.0", "255.255.255.255", 67), target=everyone),
        "priority tag": frame(mac, 0x8100, tag(0x0800, good), target=everyone),
        "two priority tags": frame(mac, 0x8100, tag(0x8100, tag(0x0800, good)), target=everyone),
        "tag": frame(mac, 0x8100, tag(0x0800, good, 5), target=everyone),
        "service tag": frame(mac, 0x88A8, tag(0x0800, good, 5), target=everyone),
        "two tags": frame(mac, 0x8100, tag(0x8100, tag(0x0800, good, 5), 5), target=everyone),
        "ipv6": frame(mac, 0x86DD, six(59), target=theirs),
        "router advertisement": frame(mac, 0x86DD, six(58, b"\x86" + bytes(15)),
                                      target="33:33:00:00:00:01"),
        "arp of another": frame(mac, 0x0806, arp(theirs, victim.address, CP), target=everyone),
        "arp of the gateway": frame(mac, 0x0806, arp(mac, GATEWAY, victim.address), target=everyone),
        "arp under another mac": frame(theirs, 0x0806, arp(mac, address, CP), target=everyone),
        "tagged arp of the gateway": frame(mac, 0x8100, tag(0x0806, arp(mac, GATEWAY, victim.address)),
                                           target=everyone),
        "lldp": frame(mac, 0x88CC, bytes(50), target="01:80:c2:00:00:0e"),
        "another's lldp": frame(theirs, 0x88CC, bytes(50), target="01:80:c2:00:00:0e"),
        "spanning tree": frame(mac, 0x0026, bytes(38), target="01:80:c2:00:00:00"),
        "mpls": frame(mac, 0x8847, bytes(50), target=gateway_mac),
        "own experiment": frame(mac, 0x88B5, bytes(50), target=theirs),
    }  # fmt: skip


async def test_forged_frames_of_an_agent_end_at_its_port(contained: Yard) -> None:
    """No frame with another's addresses, a tag, IPv6 or a strange type passes; each is told."""
    ours, box, victim = await contained.ours(202), await contained.agent(5), await contained.agent(6)
    forged = forgeries(box, victim, host_mac(contained))
    honest = frame(box.mac, 0x0800, udp(box.address, CP), target=ours.mac)
    to_host = frame(box.mac, 0x0800, udp(box.address, HOST), target=host_mac(contained))
    with listening(box.raw, victim.raw, ours.raw, lambda: bridge_socket(contained)) as (out, sibling, inner, host):
        for octets in [*forged.values(), honest, to_host]:
            out.send(octets)
        seen: list[bytes] = []
        until(lambda: honest in take(seen, inner), "the honest frame")
        at_host: list[bytes] = []
        until(lambda: to_host in take(at_host, host), "the honest frame to the host")

        from_box = bytes.fromhex(box.mac.replace(":", ""))
        assert not arrivals(forged) & {*seen, *at_host, *received(sibling)}
        assert {octets for octets in [*seen, *at_host] if octets[6:12] == from_box and not own(octets, box)} == {
            honest,
            to_host,
        }
    await eventually(lambda: len(contained.events) >= len(forged) - 3, f"the records: {len(contained.events)}")
    assert {event.sandbox_id for event in contained.events} == {box.address}
    assert {event.reason for event in contained.events} >= {"malformed", "ipv6_unrouted", "protocol"}
    # No bridge table entry moved to the forger's port either, also by frames the bridge takes for itself.
    learned = contained.sh("bridge", "fdb", "show", "dev", box.interface)
    assert victim.mac not in learned
    assert ours.mac not in learned


async def test_agents_reach_ours_by_exact_tuples_only(contained: Yard) -> None:
    """Gate, agent-side ports and the agent's listeners answer at their address; other ports and addresses do not."""
    ours, box, sibling = await contained.ours(202), await contained.agent(5), await contained.agent(6)
    monitor = await contained.ours(210)
    allowed = [53, 4444, 7080, 7444, 10000, 12000, 22999]
    closed = [80, 7443, 9902, 18374, 18901, 18902, 11999, 10001, 12001, 22998]  # the last three are another policy's
    await contained.ring.admit(box.address, [], [(6, port) for port in (10000, 12000, 22999)])
    await contained.ring.admit(sibling.address, [], [(6, 10001), (6, 12001), (6, 22998)])
    with contextlib.ExitStack() as stack:
        for port in [*allowed, *closed]:
            stack.enter_context(tcp_server("0.0.0.0", port, ours.netns))
        stack.enter_context(tcp_server("0.0.0.0", 10000, sibling.netns))
        stack.enter_context(tcp_server("0.0.0.0", 10000, monitor.netns))
        stack.enter_context(tcp_server(GATEWAY, 10000, contained.host.netns))
        answers = {port: box.connect(CP, port) for port in [*allowed, *closed]}
        others = [box.connect(address, 10000) for address in (sibling.address, monitor.address, GATEWAY)]
        box.sh("ip", "neigh", "replace", sibling.address, "lladdr", sibling.mac, "dev", "eth0")
        box.sh("ip", "neigh", "replace", MONITOR, "lladdr", monitor.mac, "dev", "eth0")
        known = [box.connect(address, 10000) for address in (sibling.address, monitor.address)]
        await eventually(lambda: [e for e in contained.events if e.destination == sibling.address], "its record")
        box.sh("ip", "neigh", "replace", sibling.address, "lladdr", host_mac(contained), "dev", "eth0")
        with listening(sibling.raw) as (inner,):
            routed = box.connect(sibling.address, 10000)
            with udp_socket(contained.host.netns, GATEWAY, 0) as fence:
                fence.sendto(b"end", (sibling.address, 9))
            arrived: list[bytes] = []
            until(functools.partial(came_through, inner, arrived), "the host's frame")
        assert not any(octets[26:30] == socket.inet_aton(box.address) for octets in arrived)

        assert answers == dict.fromkeys(allowed, box.address) | dict.fromkeys(closed, "TimeoutError")
        assert set(others) <= {"TimeoutError", "OSError"}
        assert known == ["TimeoutError"] * 2
        assert routed == "TimeoutError"
        # Ours reach each other.
        assert monitor.connect(CP, 80) == MONITOR
    refused = await eventually(lambda: [e for e in contained.events if e.destination_port == 7443], "the record")
    assert (refused[0].reason, refused[0].sandbox_id) == ("no_route", box.address)


async def test_proxy_beside_the_control_plane_is_reached_at_ones_own_listeners_only() -> None:
    """With the proxy in a container of its own, agents begin at their listeners there and nowhere else; no CoreDNS."""
    async with yard({**AS_CONTAINER, "proxy": PROXY}) as made:
        proxy, box, sibling = await made.ours(200), await made.agent(5), await made.agent(6)
        coredns, cp = await made.ours(201), await made.ours(202)
        await made.ring.admit(box.address, [], [(6, 10000)])
        await made.ring.admit(sibling.address, [], [(6, 10001)])
        with contextlib.ExitStack() as stack:
            for port in (53, 9902, 10000, 10001):
                for one in (proxy, coredns, cp):
                    stack.enter_context(tcp_server("0.0.0.0", port, one.netns))
            own = {port: box.connect(PROXY, port) for port in (10000, 10001, 53, 9902)}
            theirs = {port: sibling.connect(PROXY, port) for port in (10001, 10000)}
            elsewhere = [box.connect(one.address, port) for one, port in ((cp, 10000), (coredns, 10000), (coredns, 53))]

        lost = "TimeoutError"
        assert own == {10000: box.address, 10001: lost, 53: lost, 9902: lost}
        assert theirs == {10001: sibling.address, 10000: lost}
        assert elsewhere == [lost] * 3


async def test_wrong_table_of_the_bridge_hands_nothing_to_another_port(contained: Yard) -> None:
    """What is for one agent reaches no other, even if the bridge believes that it lives behind the other's port."""
    ours, victim, thief = await contained.ours(202), await contained.agent(5), await contained.agent(6)
    contained.sh("bridge", "fdb", "replace", victim.mac, "dev", thief.interface, "master", "static")
    for_victim = frame(ours.mac, 0x0800, tcp_segment(CP, victim.address, 40000, 7700, 2), target=victim.mac)
    fence = frame(ours.mac, 0x0800, tcp_segment(CP, thief.address, 40000, 7700, 2), target=thief.mac)
    contained.sh("ip", "neigh", "replace", victim.address, "lladdr", victim.mac, "dev", BRIDGE)
    with listening(ours.raw, thief.raw) as (out, inner), udp_socket(contained.host.netns, GATEWAY, 0) as host:
        host.sendto(b"for the victim", (victim.address, 9))
        out.send(for_victim)
        out.send(fence)
        seen: list[bytes] = []
        until(lambda: fence in take(seen, inner), "the fence")

        assert for_victim not in seen
        assert not any(b"for the victim" in octets for octets in seen)


async def test_udp_tuples_and_answers(contained: Yard) -> None:
    """A datagram to the gate's port comes and is answered; one to another port does not come."""
    ours, box = await contained.ours(202), await contained.agent(5)
    with listening(
        lambda: udp_socket(ours.netns, CP, 53),
        lambda: udp_socket(ours.netns, CP, 54),
        lambda: udp_socket(box.netns, box.address, 0),
    ) as (gate, other, mine):
        mine.sendto(b"no", (CP, 54))
        mine.sendto(b"q", (CP, 53))
        data, peer = until(lambda: attempt(gate), "the question")
        gate.sendto(b"a", peer)
        other.sendto(b"unasked", peer)
        answer, source = until(lambda: attempt(mine), "the answer")

        assert (data, peer[0]) == (b"q", box.address)
        assert (answer, source) == (b"a", (CP, 53))
        assert attempt(other) is None
        assert attempt(mine) is None


def attempt(receiver: socket.socket) -> Any:
    try:
        return receiver.recvfrom(100)
    except BlockingIOError:
        return None


async def test_control_plane_dials_the_agents_daemon_and_nobody_else_comes_in(contained: Yard) -> None:
    """7700 answers the control plane; another of ours, another port and the agent's own SYN from 7700 get nothing."""
    ours, box = await contained.ours(202), await contained.agent(5)
    monitor, sibling = await contained.ours(210), await contained.agent(6)
    with (
        tcp_server("0.0.0.0", 8080, ours.netns),
        tcp_server("0.0.0.0", 7700, ours.netns),
    ):
        early = box.connect(CP, 8080, 7700)
        with tcp_server("0.0.0.0", 7700, box.netns), tcp_server("0.0.0.0", 8080, box.netns):
            dialled = ours.connect(box.address, 7700)
            others = [ours.connect(box.address, 8080), monitor.connect(box.address, 7700)]
            siblings = sibling.connect(box.address, 7700)
            began = ours.connect(box.address, 7700, 40000)
        with tcp_server("0.0.0.0", 40000, ours.netns):
            turned = box.connect(CP, 40000, 7700)
        late = box.connect(CP, 8080, 7700)

    assert dialled == CP
    assert others == ["TimeoutError"] * 2
    assert siblings in {"TimeoutError", "OSError"}
    # Silence either way: whether the neighbour's MAC is still known decides which of the two the kernel says.
    assert began == CP and {early, turned, late} <= {"TimeoutError", "OSError"}


async def test_answer_nobody_asked_for_does_not_pass(contained: Yard) -> None:
    """A segment with ACK from port 7700 passes only on a connection that the control plane began."""
    ours, box = await contained.ours(202), await contained.agent(5)
    lone = frame(box.mac, 0x0800, tcp_segment(box.address, CP, 7700, 40000, 0x10), target=ours.mac)
    fence = frame(box.mac, 0x0800, udp(box.address, CP), target=ours.mac)
    with listening(box.raw, ours.raw) as (out, inner):
        out.send(lone)
        out.send(fence)
        seen: list[bytes] = []
        until(lambda: fence in take(seen, inner), "the fence")

    assert lone not in seen


def tcp_segment(source: str, destination: str, port: int, to_port: int, flags: int) -> bytes:
    segment = struct.pack(">HHIIBBHHH", port, to_port, 1, 1, 0x50, flags, 1000, 0, 0)
    datagram = udp(source, destination)[:20]
    header = datagram[:2] + struct.pack(">H", 40) + datagram[4:9] + b"\x06\0\0" + datagram[12:]
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return header[:10] + struct.pack(">H", ~total & 0xFFFF) + header[12:] + segment


@pytest.mark.parametrize("closed", [False, True], ids=["by-default", "by-name"])
async def test_port_without_a_pin_reaches_nothing_pinned(contained: Yard, closed: bool) -> None:  # noqa: FBT001
    """Before enrolment no frame of any kind reaches an agent, us or the host's stack, whatever it claims."""
    ours, agent, quiet = await contained.ours(202), await contained.agent(6), await contained.agent(7)
    box = await contained.known(5)
    if closed:
        assert await contained.ring.close_unpinned() == {box.interface}
    forged = forgeries(box, agent, host_mac(contained))
    for target, kind in ((ours.mac, "ours"), (agent.mac, "agent"), (host_mac(contained), "host")):
        forged[f"own address to {kind}"] = frame(box.mac, 0x0800, udp(box.address, CP), target=target)
        forged[f"foreign address to {kind}"] = frame(box.mac, 0x0800, udp("192.0.2.7", "192.0.2.8"), target=target)
        forged[f"agent's tagged to {kind}"] = frame(
            agent.mac, 0x8100, tag(0x0800, udp(agent.address, GATEWAY)), target=target
        )
    forged["tagged to all as the agent"] = frame(
        box.mac, 0x8100, tag(0x0800, udp(agent.address, GATEWAY)), target="ff:ff:ff:ff:ff:ff"
    )
    forged["tagged arp as the agent"] = frame(
        box.mac, 0x8100, tag(0x0806, arp(box.mac, agent.address, GATEWAY, 1)), target="ff:ff:ff:ff:ff:ff"
    )
    forged["as the quiet one"] = frame(quiet.mac, 0x88B5, bytes(50), target="ff:ff:ff:ff:ff:ff")
    forged["as the quiet one to the bridge"] = frame(quiet.mac, 0x88CC, bytes(50), target="01:80:c2:00:00:0e")
    fence = frame(agent.mac, 0x0800, udp(agent.address, CP), target=ours.mac)
    with (
        listening(box.raw, agent.raw, ours.raw, agent.raw) as (out, victim, inner, honest),
        listening(
            lambda: udp_socket(contained.host.netns, GATEWAY, 53),
            lambda: udp_socket(contained.host.netns, "0.0.0.0", 67),
        ) as (gate, dhcp),
        tcp_server("0.0.0.0", 10000, ours.netns),
        tcp_server("0.0.0.0", 10000, contained.host.netns),
    ):
        for octets in forged.values():
            out.send(octets)
        honest.send(fence)
        seen: list[bytes] = []
        until(lambda: fence in take(seen, inner), "the fence")

        assert not arrivals(forged) & {*seen, *received(victim)}
        assert attempt(gate) is None
        assert attempt(dhcp) is None
        assert {box.connect(CP, 10000), box.connect(GATEWAY, 10000), box.connect(HOST, 10000)} <= {
            "TimeoutError", "OSError",
        }  # fmt: skip
    neighbours = contained.sh("ip", "neigh", "show", "dev", BRIDGE)
    assert box.mac not in neighbours
    learned = contained.sh("bridge", "fdb", "show", "dev", box.interface)
    assert box.mac in learned or closed
    assert quiet.mac not in learned
    told = await eventually(lambda: [e for e in contained.events if e.reason == "not_enrolled"], "the records")
    assert box.address in {event.sandbox_id for event in told}


async def test_two_ports_without_pins_are_closed_once_they_are_named(contained: Yard) -> None:
    """Between two unpinned ports frames without our addresses pass, and none in or out of one the watch has seen."""
    one, two = await contained.known(5), await contained.known(6)
    there, back = (frame(a.mac, 0x88B5, bytes(50), target=b.mac) for a, b in ((one, two), (two, one)))
    claimed = frame(one.mac, 0x0800, udp(one.address, two.address), target=two.mac)
    who_has = frame(one.mac, 0x0806, arp(one.mac, one.address, two.address, 1), target="ff:ff:ff:ff:ff:ff")
    with listening(one.raw, two.raw) as (first, second):
        for octets in (claimed, who_has, there):
            first.send(octets)
        seen: list[bytes] = []
        until(lambda: there in take(seen, second), "the frame of the window")
        assert {claimed, who_has}.isdisjoint(seen)

        watch = PortWatch(BRIDGE, host_pid=contained.host.pid)
        await watch.open()
        try:
            await watch.wait_changed()
            assert await contained.ring.close_unpinned() == {one.interface, two.interface}
            late = contained.box(7)
            async with asyncio.timeout(10):
                await watch.wait_changed()
        finally:
            watch.close()
        # One is named, the other is not yet: neither way is open.
        with listening(late.raw) as (third,):
            third.send(frame(late.mac, 0x88B5, bytes(50), target=two.mac))
            second.send(frame(two.mac, 0x88B5, bytes(50), target=late.mac))
            first.send(there)
            second.send(back)
            with udp_socket(contained.host.netns, GATEWAY, 0) as mine:
                for box, packets in ((one, first), (two, second), (late, third)):
                    # What the host itself sends to a port comes after what was sent there before.
                    contained.sh("ip", "neigh", "replace", box.address, "lladdr", box.mac, "dev", BRIDGE)
                    mine.sendto(b"end", (box.address, 9))
                    arrived: list[bytes] = []
                    until(functools.partial(came_through, packets, arrived), "the host's frame")
                    assert not any(octets[12:14] == b"\x88\xb5" for octets in arrived)
        assert len(await contained.ring.close_unpinned()) == 3


def came_through(packets: socket.socket, arrived: list[bytes]) -> bool:
    arrived.extend(received(packets))
    return any(b"end" in octets for octets in arrived)


async def test_stranger_is_not_taken_for_an_agent_behind_the_bridge(hosted: Yard) -> None:
    """The gate gets no datagram that an unpinned port sends as an agent, however tagged; the agent's own comes."""
    agent, stranger = await hosted.agent(6), await hosted.known(5)
    as_agent = udp(agent.address, GATEWAY)
    everyone, gateway = "ff:ff:ff:ff:ff:ff", host_mac(hosted)
    with (
        listening(stranger.raw, agent.raw) as (out, honest),
        listening(lambda: udp_socket(hosted.host.netns, GATEWAY, 53)) as (gate,),
    ):
        for target in (everyone, gateway):
            for mac in (stranger.mac, agent.mac):
                out.send(frame(mac, 0x0800, as_agent, target=target))
                out.send(frame(mac, 0x8100, tag(0x0800, as_agent), target=target))
                out.send(frame(mac, 0x8100, tag(0x8100, tag(0x0800, as_agent)), target=target))
        before = attempt(gate)
        honest.send(frame(agent.mac, 0x0800, as_agent, target=gateway))
        data, peer = until(lambda: attempt(gate), "the agent's datagram")

        assert before is None
        assert (data, peer[0]) == (b"mark", agent.address)
        assert attempt(gate) is None


async def test_gateway_tuples_when_the_control_plane_is_on_the_host(hosted: Yard) -> None:
    """On the gateway the tuples answer agents only; its other ports and the host's other addresses do not."""
    box, stranger = await hosted.agent(5), await hosted.known(6)
    where = hosted.host.netns
    with (
        tcp_server("0.0.0.0", 10000, where), tcp_server("0.0.0.0", 53, where), tcp_server("0.0.0.0", 8080, where),
        tcp_server("0.0.0.0", 9902, where), tcp_server("0.0.0.0", 18901, where), tcp_server("0.0.0.0", 7700, box.netns),
        tcp_server("0.0.0.0", 15000, where),
    ):  # fmt: skip
        assert box.connect(GATEWAY, 10000) == "TimeoutError"  # not this agent's listener yet
        await hosted.ring.admit(box.address, [], [(6, 10000)])
        assert [box.connect(GATEWAY, port) for port in (10000, 53)] == [box.address] * 2
        assert [box.connect(GATEWAY, port) for port in (8080, 9902, 18901, 15000)] == ["TimeoutError"] * 4
        assert box.connect(HOST, 10000) == "TimeoutError"
        assert stranger.connect(GATEWAY, 10000) in {"TimeoutError", "OSError"}
        assert hosted.from_host(box.address, 7700) == GATEWAY
    refused = await eventually(lambda: [e for e in hosted.events if e.destination_port == 8080], "the record")
    assert (refused[0].reason, refused[0].sandbox_id) == ("no_route", box.address)


async def test_world_is_closed_until_admitted(contained: Yard) -> None:
    """Direct paths and a timed bypass open what they name, reserved stays closed, and all closes again."""
    box, ours = await contained.agent(5), await contained.ours(202)
    ring = contained.ring
    with (
        tcp_server(WORLD, 5432, contained.world), tcp_server(WORLD, 5433, contained.world),
        tcp_server(FAR, 5432, contained.world),
    ):  # fmt: skip
        assert box.connect(WORLD, 5432) == "TimeoutError"
        assert ours.connect(WORLD, 5432) == HOST
        await ring.admit(box.address, [Direct("198.51.100.0/24", 6, 5000, 5432)])
        assert [box.connect(WORLD, 5432), box.connect(WORLD, 5433)] == [HOST, "TimeoutError"]
        await ring.admit(box.address, [])
        assert box.connect(WORLD, 5432) == "TimeoutError"

        await ring.reserve(["203.0.113.0/24"])
        await ring.admit_all(box.address, 300)
        assert [box.connect(WORLD, 5433), box.connect(FAR, 5432)] == [HOST, "TimeoutError"]
        await ring.end_all(box.address)
        assert box.connect(WORLD, 5433) == "TimeoutError"
        await ring.admit_all(box.address, 1.0)
        assert box.connect(WORLD, 5433) == HOST
        until(lambda: box.connect(WORLD, 5433) == "TimeoutError", "the end by the kernel's clock")
