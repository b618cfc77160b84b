"""Real sockets over time: enrolment, bypass, quarantine, nested cgroups, sockets that change hands, inbound."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from clawker_cp.ebpf.config import InboundFrom
from clawker_cp.firewall.plan import TCP, UDP
from clawker_cp.testing.bpf_abi import REASONS
from clawker_cp.testing.socket_world import AGENT, CONFIG, GATEWAY, OTHER, TARGET, Actor, SocketWorld, cgroup_id

pytestmark = pytest.mark.root

HTTPS, NAME = 443, 300


def allow(world: SocketWorld, agent: Actor) -> None:
    """TARGET 443 tcp and 5000 udp by listeners."""
    world.knows(agent, TARGET, NAME)
    world.route(NAME, HTTPS, TCP, 10001)
    world.route(NAME, 5000, UDP, 11001)
    world.apply()


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends through which agents pass sockets."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


def test_nothing_before_enrolment(world: SocketWorld) -> None:
    """A process below the agents' parent that nobody enrolled reaches nothing, not even itself (I4)."""
    early = world.actor(world.cgroup())

    for addr, port in ((TARGET, HTTPS), (GATEWAY, 7444), ("8.8.8.8", 53), ("127.0.0.1", 80)):
        assert early.error("connect", early.tcp(), addr, port) == "EACCES"
        assert early.error("sendto", early.udp(), "x", addr, port) == "EACCES"
    assert set(world.decisions()) == {"denied not_enrolled"}
    assert world.arrived() == []


def test_enrolment_takes_effect_at_once(world: SocketWorld) -> None:
    """The same process works as soon as its row is there, and stops when it is withdrawn."""
    cgroup = world.cgroup()
    early = world.actor(cgroup)
    assert early.error("connect", early.tcp(), GATEWAY, 7444) == "EACCES"

    world.manager.enroll(cgroup_id(cgroup), CONFIG)
    handle = early.tcp()
    early("connect", handle, GATEWAY, 7444)
    world.manager.withdraw(cgroup_id(cgroup))
    world.arrived()
    early("send", handle, "late")

    assert early.error("receive", handle, 0.2) == "TIMEOUT"
    assert [data for _, _, _, data in world.arrived() if data] == []


def test_connected_before_enrolment(world: SocketWorld) -> None:
    """A connection made while nothing was enforced is judged packet by packet from then on (threat 8)."""
    cgroup = world.cgroup()
    early = world.actor(cgroup)
    with world.unenforced():
        stream, datagram = early.tcp(), early.udp()
        early("connect", stream, OTHER, 5000)
        early("connect", datagram, OTHER, 5000)
        early("send", datagram, "before")
        early("receive", datagram)
        early("send", stream, "before")
        early("receive", stream)  # by now the server has seen the connection, and says no more of it
    world.manager.enroll(cgroup_id(cgroup), CONFIG)
    world.arrived()
    world.events()
    early("send", stream, "after")

    assert early.error("send", datagram, "after") == "EPERM"
    assert early.error("receive", stream, 0.2) == "TIMEOUT"
    assert world.arrived() == []
    assert set(world.decisions()) == {"denied no_route"}


def test_nested_cgroups_are_the_agent(world: SocketWorld) -> None:
    """A process that moved itself into a cgroup of its own is still that agent (threat 6)."""
    agent = world.agent()
    allow(world, agent)
    deeper = world.actor(world.cgroup(f"{agent.cgroup.name}/inner/most"))

    assert deeper.dial(TARGET, HTTPS) == f"{GATEWAY}|10001|hello"
    assert deeper.error("connect", deeper.tcp(), OTHER, HTTPS) == "ECONNREFUSED"
    assert {event.cgroup_id for event in world.events()} == {cgroup_id(agent.cgroup)}


def test_agents_do_not_share_names(world: SocketWorld) -> None:
    """What one agent was told of an address opens nothing for another of the same policy (R8)."""
    agent, other = world.agent(), world.agent()
    allow(world, agent)

    assert agent.dial(TARGET, HTTPS) == f"{GATEWAY}|10001|hello"
    assert other.error("connect", other.tcp(), TARGET, HTTPS) == "ECONNREFUSED"


def test_passed_sockets_stay_their_makers(world: SocketWorld, channel: tuple[socket.socket, socket.socket]) -> None:
    """A socket handed to another agent is judged as its maker's, at connect and by packet (threat 7)."""
    maker, user = world.agent(channel=channel[0]), world.agent(channel=channel[1])
    allow(world, user)
    maker("give", maker.udp())
    passed = user("take")

    assert user.error("connect", passed, TARGET, 5000) == "ECONNREFUSED"
    assert user.error("sendto", passed, "x", TARGET, 5000) == "ECONNREFUSED"
    assert {event.cgroup_id for event in world.events()} == {cgroup_id(maker.cgroup)}
    assert world.arrived() == []


def test_sockets_connected_by_an_outsider_are_still_judged(
    world: SocketWorld, channel: tuple[socket.socket, socket.socket]
) -> None:
    """An accomplice outside the agents' cgroup cannot connect an agent's socket for it (threat 7)."""
    agent = world.agent(channel=channel[0])
    accomplice = world.bystander(channel[1])
    agent("give", agent.tcp())

    assert accomplice.error("connect", accomplice("take"), OTHER, 5000) == "ECONNREFUSED"


def test_foreign_receivers_on_loopback(world: SocketWorld) -> None:
    """A loopback packet to a socket of somebody outside the agent is dropped (threat 33)."""
    agent, bystander = world.agent(), world.bystander()
    stream, datagram = bystander.tcp(), bystander.udp()
    bystander("bind", stream, "127.0.0.1", 6100)
    bystander("listen", stream)
    bystander("bind", datagram, "127.0.0.1", 6100)

    assert agent.error("sendto", agent.udp(), "x", "127.0.0.1", 6100) == "EPERM"
    assert agent.error("connect", agent.tcp(), "127.0.0.1", 6100, 0.3) == "TIMEOUT"
    assert bystander.error("receive", datagram, 0.1) == "TIMEOUT"
    assert set(world.decisions()) == {"denied engine_resolver"}


def test_bypass_ends_while_sockets_are_open(world: SocketWorld) -> None:
    """Past the deadline the kernel drops what the bypass opened, whoever is alive (I3, threat 9)."""
    agent = world.agent()
    ends = time.monotonic_ns() + 700_000_000
    world.manager.bypass(cgroup_id(agent.cgroup), ends)
    stream, datagram = agent.tcp(), agent.udp()
    agent("connect", stream, OTHER, 5000)
    agent("connect", datagram, OTHER, 5000)
    for handle in (stream, datagram):
        agent("send", handle, "during")
        assert agent("receive", handle)[0] == f"{OTHER}|5000|during"
    assert world.decisions() == ["bypassed bypass"] * 2

    _until(ends)
    world.arrived()
    agent("send", stream, "after")

    assert agent.error("send", datagram, "after") == "EPERM"
    assert agent.error("receive", stream, 0.2) == "TIMEOUT"
    assert agent.error("connect", agent.tcp(), OTHER, 5000) == "ECONNREFUSED"
    assert world.arrived() == []


def _until(when_ns: int) -> None:
    """Wait for the clock, which is the condition."""
    while (left := when_ns - time.monotonic_ns()) >= 0:
        time.sleep(left / 1e9 + 0.001)


def test_bypass_never_covers_ours(world: SocketWorld) -> None:
    """The agents' subnet and the gateway stay closed during a bypass (R12, R15)."""
    agent = world.agent(replace(CONFIG, bypass_until_ns=time.monotonic_ns() + 10**11))

    assert agent.error("connect", agent.tcp(), GATEWAY, 22) == "ECONNREFUSED"
    assert agent.error("connect", agent.tcp(), AGENT, 22) == "ECONNREFUSED"
    assert agent.error("connect", agent.tcp(), GATEWAY, 10001) == "EACCES"


def test_learning_passes_and_records(world: SocketWorld) -> None:
    """A learning agent's flows go straight, each with its record (R38)."""
    agent = world.agent(replace(CONFIG, learn=True))

    assert agent.dial(OTHER, 5000) == f"{OTHER}|5000|hello"
    assert agent.error("connect", agent.tcp(), GATEWAY, 22) == "ECONNREFUSED"
    assert world.decisions() == ["allowed learn", "denied no_route"]


def test_quarantine_holds_for_open_connections(world: SocketWorld) -> None:
    """Quarantine silences a connection in flight and leaves the control plane; release lets it go on (R16)."""
    agent = world.agent()
    allow(world, agent)
    handle = agent.tcp()
    agent("connect", handle, TARGET, HTTPS)
    world.manager.quarantine(cgroup_id(agent.cgroup), on=True)
    world.arrived()
    world.events()
    agent("send", handle, "silenced")

    assert agent.error("receive", handle, 0.2) == "TIMEOUT"
    assert agent.error("connect", agent.tcp(), TARGET, HTTPS) == "EACCES"
    assert agent.dial(GATEWAY, 7444) == f"{GATEWAY}|7444|hello"
    assert "silenced" not in [data for _, _, _, data in world.arrived()]
    assert set(world.decisions()) == {"denied quarantined", "allowed infrastructure"}
    world.manager.quarantine(cgroup_id(agent.cgroup), on=False)
    assert agent("receive", handle, 5.0)[0] == f"{GATEWAY}|10001|silenced"


def test_removed_rules_cut_by_packet(world: SocketWorld) -> None:
    """A connection whose rule is gone carries no further byte; others do not notice (I6)."""
    agent = world.agent()
    world.cidr(f"{OTHER}/32", TCP, 5000)
    world.cidr(f"{TARGET}/32", TCP, 5000)
    world.apply()
    cut, kept = agent.tcp(), agent.tcp()
    agent("connect", cut, OTHER, 5000)
    agent("connect", kept, TARGET, 5000)
    world.cidrs = [row for row in world.cidrs if str(row.prefix) != f"{OTHER}/32"]
    world.apply()
    world.arrived()
    agent("send", cut, "gone")
    agent("send", kept, "here")

    assert agent("receive", kept)[0] == f"{TARGET}|5000|here"
    assert agent.error("receive", cut, 0.2) == "TIMEOUT"
    assert "gone" not in [data for _, _, _, data in world.arrived()]


def test_dropped_packets_are_recorded_once_a_second(world: SocketWorld) -> None:
    """A socket whose packets are dropped makes one record a second, and a count for each packet (threat 26)."""
    cgroup = world.cgroup()
    agent = world.actor(cgroup)
    with world.unenforced():
        handle = agent.udp()
        agent("connect", handle, OTHER, 5000)
    world.manager.enroll(cgroup_id(cgroup), CONFIG)
    world.events()
    started = time.monotonic()
    for _ in range(40):
        assert agent.error("send", handle, "x") == "EPERM"
    seconds = time.monotonic() - started

    records = world.events()

    assert 1 <= len(records) <= 2 + seconds
    counted = world.manager.counters()
    assert sum(n for key, n in counted.items() if key[0] == cgroup_id(cgroup)) == 40


def test_inbound_is_closed(world: SocketWorld) -> None:
    """Nobody outside reaches what an agent listens on, by TCP or UDP, and the attempt is recorded (threat 14)."""
    agent = world.agent()
    server, receiver = agent.tcp(), agent.udp()
    agent("bind", server, AGENT, 8080)
    agent("listen", server)
    agent("bind", receiver, AGENT, 8080)

    assert world.outside.error("connect", world.outside.tcp(), AGENT, 8080, 0.3) == "TIMEOUT"
    world.outside("sendto", world.outside.udp(), "in", AGENT, 8080)
    assert agent.error("receive", receiver, 0.2) == "TIMEOUT"
    assert set(world.decisions()) == {"denied inbound"}


def test_published_ports_are_open_to_whom_they_are_for(world: SocketWorld) -> None:
    """A published port is reached from the host only, replies pass, and the connection is recorded (contract 1.3)."""
    agent = world.agent()
    world.manager.set_inbound(cgroup_id(agent.cgroup), {8080: InboundFrom.HOST})
    server = agent.tcp()
    agent("bind", server, AGENT, 8080)
    agent("listen", server)
    stranger, host = world.outside.tcp(), world.outside.tcp()
    world.outside("bind", stranger, OTHER, 0)

    assert world.outside.error("connect", stranger, AGENT, 8080, 0.3) == "TIMEOUT"
    world.events()
    world.outside("connect", host, AGENT, 8080)
    accepted = agent("accept", server)
    agent("send", accepted, "served")
    assert world.outside("receive", host)[0] == "served"
    (event,) = world.events()
    assert (REASONS[event.reason], event.port, event.addr[-4:]) == ("inbound_reply", 8080, socket.inet_aton(GATEWAY))

    world.manager.set_inbound(cgroup_id(agent.cgroup), {})
    agent("send", accepted, "closed now")
    assert world.outside.error("receive", host, 0.2) == "TIMEOUT"


def test_the_control_plane_gets_in_while_quarantined(world: SocketWorld) -> None:
    """The agent daemon's port stays open to the control plane alone: that is how trust is restored (R16)."""
    agent = world.agent(replace(CONFIG, quarantined=True))
    world.manager.set_inbound(cgroup_id(agent.cgroup), {7700: InboundFrom.CONTROL_PLANE, 80: InboundFrom.ANY})
    for port in (7700, 80):
        server = agent.tcp()
        agent("bind", server, AGENT, port)
        agent("listen", server)

    world.outside("connect", world.outside.tcp(), AGENT, 7700)
    assert world.outside.error("connect", world.outside.tcp(), AGENT, 80, 0.3) == "TIMEOUT"


def test_udp_replies_only_from_where_the_agent_may_send(world: SocketWorld) -> None:
    """A datagram from an address the agent may not talk to does not reach its socket."""
    agent = world.agent()
    allow(world, agent)
    handle = agent.udp()
    agent("sendto", handle, "x", TARGET, 5000)
    agent("receive", handle)
    own = agent("own", handle)[1]
    world.outside("sendto", world.outside.udp(), "injected", AGENT, own)

    assert agent.error("receive", handle, 0.2) == "TIMEOUT"


def test_sequence_shows_no_loss(world: SocketWorld) -> None:
    """Records of one agent are numbered without a gap when nothing was suppressed."""
    agent = world.agent()
    allow(world, agent)
    for port in (HTTPS, 1, HTTPS, 2):
        agent.error("connect", agent.tcp(), TARGET, port)

    assert [event.sequence for event in world.events()] == [1, 2, 3, 4]
