"""Real sockets under the attached programs: what leaves, where it ends, and how fast a refusal is."""

from __future__ import annotations

import socket

import pytest

from clawker_cp.accel import KernelEvent
from clawker_cp.firewall.plan import TCP, UDP, RouteAction
from clawker_cp.testing.bpf_abi import REASONS
from clawker_cp.testing.socket_world import AGENT, GATEWAY, OTHER, SIBLING, TARGET, TARGET6, Actor, SocketWorld

pytestmark = pytest.mark.root

HTTPS, NAME = 443, 300
MPTCP, SCTP, DCCP, UDPLITE, L2TP, SMC = 262, 132, 33, 136, 115, 256
V6, ANY6 = socket.AF_INET6, "::1"


@pytest.fixture
def agent(world: SocketWorld) -> Actor:
    """An agent that may use TARGET: 443 tcp by a listener, 22 tcp denied, 5000 udp by a listener."""
    made = world.agent()
    world.knows(made, TARGET, NAME)
    world.route(NAME, HTTPS, TCP, 10001)
    world.route(NAME, 22, TCP, 0, RouteAction.DENY)
    world.route(NAME, 5000, UDP, 11001)
    world.apply()
    return made


def test_allowed_name_reaches_its_listener(world: SocketWorld, agent: Actor) -> None:
    """An allowed connect ends at the listener, the application sees the peer it dialled, one record says so."""
    handle = agent.tcp()
    agent("connect", handle, TARGET, HTTPS)
    agent("send", handle, "hi")

    assert agent("receive", handle)[0] == f"{GATEWAY}|10001|hi"
    assert agent("peer", handle) == [TARGET, HTTPS]
    (event,) = world.events()
    assert (event.addr[-4:], event.port, event.proxy_port) == (socket.inet_aton(TARGET), HTTPS, 10001)
    assert (event.identity, event.policy, event.rule, event.pid) == (NAME, 1, 3, agent.pid)
    assert (event.family, event.protocol, event.type, event.sequence) == (2, 6, 1, 1)
    assert event.cookie != 0


@pytest.mark.parametrize(
    ("addr", "port", "errno", "reason"),
    [
        (TARGET, 23, "ECONNREFUSED", "no_route"),
        (TARGET, 22, "EACCES", "rule_deny"),
        (OTHER, HTTPS, "ECONNREFUSED", "no_route"),
        (TARGET6, HTTPS, "ECONNREFUSED", "ipv6_unrouted"),
        (GATEWAY, 10002, "EACCES", "proxy_port"),
        (GATEWAY, HTTPS, "ECONNREFUSED", "no_route"),
        (SIBLING, 80, "ECONNREFUSED", "no_route"),
        ("127.0.0.11", 41234, "EACCES", "engine_resolver"),
        ("255.255.255.255", 67, "ECONNREFUSED", "no_route"),
        ("224.0.0.251", 5353, "ECONNREFUSED", "no_route"),
    ],
)
@pytest.mark.parametrize("how", ["tcp", "udp", "sendto"])
def test_everything_else_is_refused_at_once(
    world: SocketWorld, agent: Actor, how: str, addr: str, port: int, errno: str, reason: str
) -> None:
    """A refusal takes no waiting, has an errno that programs understand, a reason, and no packet."""
    if (addr, port, how) in ((TARGET, 22, "udp"), (TARGET, 22, "sendto")):
        errno, reason = "ECONNREFUSED", "no_route"
    if (addr, port) == (GATEWAY, 10002) and how != "tcp":
        port = 11002
    family = V6 if ":" in addr else socket.AF_INET
    handle = agent.tcp(family) if how == "tcp" else agent.udp(family)
    if "255" in addr:
        agent("option", handle, socket.SOL_SOCKET, socket.SO_BROADCAST, "01000000")
    # With a limit of 0 seconds a connection that is only being tried is EINPROGRESS.
    call = ("sendto", handle, "out", addr, port) if how == "sendto" else ("connect", handle, addr, port, 0)

    assert agent.error(*call) == errno
    assert world.decisions() == [f"denied {reason}"]
    assert world.arrived() == []


def test_a_connection_keeps_the_port_of_the_policy_it_was_made_under(world: SocketWorld, agent: Actor) -> None:
    """After its agent has moved to another policy it goes on, as long as the old one has the port; a new one cannot."""
    handle = agent.tcp()
    agent("connect", handle, TARGET, HTTPS)
    agent("send", handle, "one")
    first = agent("receive", handle)[0]
    world.configure(agent, policy=2)
    agent("send", handle, "two")
    second = agent("receive", handle)[0]
    straight = agent.error("connect", agent.tcp(), GATEWAY, 10001)
    world.configure(agent, policy=2, quarantined=True)
    agent("send", handle, "three")
    world.configure(agent, policy=2)

    assert (first, second) == (f"{GATEWAY}|10001|one", f"{GATEWAY}|10001|two")
    assert straight == "EACCES"
    assert "denied quarantined" in world.decisions()


def test_root_has_no_exemption(world: SocketWorld, agent: Actor) -> None:
    """The agents here run as uid 0 with every capability: nothing passes for that (threats 1, 19)."""
    (uid,) = {event.uid for event in _after(world, agent.error("connect", agent.tcp(), OTHER, 80))}

    assert uid == 0


def _after(world: SocketWorld, _: object) -> list[KernelEvent]:
    return world.events()


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_port_53_is_the_gate(world: SocketWorld, agent: Actor, kind: str) -> None:
    """Whatever resolver is asked, the gate answers, and the answer seems to come from who was asked."""
    handle = agent.udp() if kind == "udp" else agent.tcp()
    if kind == "tcp":
        agent("connect", handle, "8.8.8.8", 53)
        agent("send", handle, "q")
        assert agent("peer", handle) == ["8.8.8.8", 53]
        assert agent("receive", handle)[0] == f"{GATEWAY}|53|q"
    else:
        agent("sendto", handle, "q", "8.8.8.8", 53)
        assert agent("receive", handle) == [f"{GATEWAY}|53|q", ["8.8.8.8", 53]]

    assert world.decisions() == ["redirected dns"]


def test_replies_of_an_unconnected_socket(world: SocketWorld, agent: Actor) -> None:
    """One socket may talk to several destinations; each reply has the source that was named."""
    world.knows(agent, OTHER, 301)
    world.route(301, 5000, UDP, 11002)
    world.apply()
    handle = agent.udp()
    agent("sendto", handle, "a", TARGET, 5000)
    agent("sendto", handle, "b", OTHER, 5000)
    agent("sendto", handle, "c", TARGET, 5000)

    answers = sorted(agent("receive", handle) for _ in range(3))

    assert answers == [
        [f"{GATEWAY}|11001|a", [TARGET, 5000]],
        [f"{GATEWAY}|11001|c", [TARGET, 5000]],
        [f"{GATEWAY}|11002|b", [OTHER, 5000]],
    ]
    assert world.decisions() == ["redirected name_route"] * 2


def test_repeated_datagrams_are_counted_not_recorded(world: SocketWorld, agent: Actor) -> None:
    """The first datagram of a flow is a record, the others are exact counts (threat 26)."""
    handle = agent.udp()
    for _ in range(50):
        agent("sendto", handle, "x", TARGET, 5000)

    assert world.decisions() == ["redirected name_route"]
    counted = {key[1:4]: n for key, n in world.manager.counters().items() if key[0] == _number(agent)}
    assert sum(counted.values()) == 50


def _number(agent: Actor) -> int:
    return agent.cgroup.stat().st_ino


def test_connected_datagram_socket(world: SocketWorld, agent: Actor) -> None:
    """A connected UDP socket sees the peer it named, also as the source of replies."""
    handle = agent.udp()
    agent("connect", handle, TARGET, 5000)
    agent("send", handle, "x")

    assert agent("receive", handle) == [f"{GATEWAY}|11001|x", [TARGET, 5000]]
    assert agent("peer", handle) == [TARGET, 5000]


def test_connected_then_sent_elsewhere(world: SocketWorld, agent: Actor) -> None:
    """Being connected to an allowed destination allows no other one (threat 18)."""
    handle = agent.udp()
    agent("connect", handle, TARGET, 5000)
    world.events()

    assert agent.error("sendto", handle, "x", OTHER, 5000) == "ECONNREFUSED"
    assert agent.error("send_unspec", handle, "x", OTHER, 5000) == "ECONNREFUSED"
    assert agent.error("sendto", handle, "x", OTHER, 5000, socket.MSG_MORE) == "ECONNREFUSED"
    agent("disconnect", handle)
    assert agent.error("sendto", handle, "x", OTHER, 5000) == "ECONNREFUSED"
    assert world.decisions() == ["denied no_route"] * 4
    assert world.arrived() == []


def test_reconnect_forgets_the_earlier_peer(world: SocketWorld, agent: Actor) -> None:
    """The peer of a socket that now goes straight is where it goes."""
    world.cidr(f"{OTHER}/32", UDP, 5000)
    world.apply()
    handle = agent.udp()
    agent("connect", handle, TARGET, 5000)
    agent("connect", handle, OTHER, 5000)
    agent("send", handle, "x")

    assert agent("peer", handle) == [OTHER, 5000]
    assert agent("receive", handle) == [f"{OTHER}|5000|x", [OTHER, 5000]]


def test_sending_straight_keeps_the_peer(world: SocketWorld, agent: Actor) -> None:
    """A datagram to somewhere else does not change who a connected socket's peer is."""
    world.cidr(f"{OTHER}/32", UDP, 5000)
    world.apply()
    handle = agent.udp()
    agent("connect", handle, TARGET, 5000)
    agent("sendto", handle, "x", OTHER, 5000)

    assert agent("peer", handle) == [TARGET, 5000]


def test_fast_open(world: SocketWorld, agent: Actor) -> None:
    """TCP Fast Open is a connect like any other, in both directions of the decision (threat 17)."""
    handle = agent.tcp()
    agent("sendto", handle, "fast", TARGET, HTTPS, socket.MSG_FASTOPEN)

    assert agent("receive", handle)[0] == f"{GATEWAY}|10001|fast"
    assert agent("peer", handle) == [TARGET, HTTPS]
    assert agent.error("sendto", agent.tcp(), "fast", OTHER, HTTPS, socket.MSG_FASTOPEN) == "ECONNREFUSED"
    assert world.decisions() == ["redirected name_route", "denied no_route"]


def test_mapped_addresses_are_ipv4(world: SocketWorld, agent: Actor) -> None:
    """An IPv6 socket that names an IPv4 address is judged, sent and told as IPv4 (threat 18)."""
    stream, datagram = agent.tcp(V6), agent.udp(V6)
    agent("connect", stream, f"::ffff:{TARGET}", HTTPS)
    agent("send", stream, "x")
    agent("sendto", datagram, "y", f"::ffff:{TARGET}", 5000)

    assert agent("receive", stream)[0] == f"{GATEWAY}|10001|x"
    assert agent("peer", stream) == [f"::ffff:{TARGET}", HTTPS]
    assert agent("receive", datagram) == [f"{GATEWAY}|11001|y", [f"::ffff:{TARGET}", 5000]]
    assert agent.error("connect", agent.tcp(V6), f"::ffff:{OTHER}", HTTPS) == "ECONNREFUSED"
    assert agent.error("sendto", agent.udp(V6), "z", f"::ffff:{OTHER}", 5000) == "ECONNREFUSED"
    assert world.decisions() == ["redirected name_route"] * 2 + ["denied no_route"] * 2


def test_connected_mapped_datagrams(world: SocketWorld, agent: Actor) -> None:
    """A connected IPv6 UDP socket with an IPv4 peer gets replies from the peer it named."""
    handle = agent.udp(V6)
    agent("connect", handle, f"::ffff:{TARGET}", 5000)
    agent("send", handle, "x")

    assert agent("receive", handle) == [f"{GATEWAY}|11001|x", [f"::ffff:{TARGET}", 5000]]
    assert agent("peer", handle) == [f"::ffff:{TARGET}", 5000]


def test_routed_ipv6_passes_by_rule(world: SocketWorld, agent: Actor) -> None:
    """Where the network routes IPv6, the same rules hold for it, replies included."""
    world.configure(agent, ipv6=True)
    world.cidr("2001:db8::/64", TCP, 5000)
    world.cidr("2001:db8::/64", UDP, 5000)
    world.apply()
    handle = agent.udp(V6)
    agent("sendto", handle, "u", TARGET6, 5000)

    assert agent.dial(TARGET6, 5000) == f"{TARGET6}|5000|hello"
    assert agent("receive", handle) == [f"{TARGET6}|5000|u", [TARGET6, 5000]]
    assert agent.error("connect", agent.tcp(V6), TARGET6, HTTPS) == "ECONNREFUSED"


def test_address_rule_goes_straight(world: SocketWorld, agent: Actor) -> None:
    """A CIDR rule's destination is reached without a proxy, and only on its ports."""
    world.cidr("198.51.100.0/24", TCP, 5000)
    world.cidr("198.51.100.0/24", UDP, 5000)
    world.apply()
    handle = agent.udp()
    agent("sendto", handle, "u", OTHER, 5000)

    assert agent.dial(OTHER, 5000) == f"{OTHER}|5000|hello"
    assert agent("receive", handle) == [f"{OTHER}|5000|u", [OTHER, 5000]]
    assert agent.error("connect", agent.tcp(), OTHER, HTTPS) == "ECONNREFUSED"


def test_infrastructure_needs_no_rule(world: SocketWorld, agent: Actor) -> None:
    """The control plane's agent port is reachable as it is."""
    assert agent.dial(GATEWAY, 7444) == f"{GATEWAY}|7444|hello"
    assert world.decisions() == ["allowed infrastructure"]


@pytest.mark.parametrize(
    ("family", "kind", "protocol", "errno"),
    [
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP, "EACCES"),
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW, "EACCES"),
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP, "EACCES"),
        (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6, "EACCES"),
        (socket.AF_INET, socket.SOCK_STREAM, MPTCP, "EPROTONOSUPPORT"),
        (socket.AF_INET6, socket.SOCK_STREAM, MPTCP, "EPROTONOSUPPORT"),
        (socket.AF_INET, socket.SOCK_DGRAM, UDPLITE, "EACCES"),
        (socket.AF_INET, socket.SOCK_STREAM, SCTP, "EACCES"),
        (socket.AF_INET, socket.SOCK_DGRAM, L2TP, "EACCES"),
        (socket.AF_INET, socket.SOCK_STREAM, SMC, "EACCES"),
    ],
)
def test_other_sockets_are_not_made(
    world: SocketWorld, agent: Actor, family: int, kind: int, protocol: int, errno: str
) -> None:
    """Raw, MPTCP, UDP-Lite, SCTP, L2TP, SMC: no such socket exists in an agent (threats 12, 17)."""
    found = agent.error("make", family, kind, protocol)

    # Protocols that this kernel does not have fail before the hook is asked.
    assert found in {errno, "EPROTONOSUPPORT", "ESOCKTNOSUPPORT"}
    assert world.decisions() == ["denied protocol"] or (found != errno and not world.decisions())


def test_ping_sockets_are_not_made(world: SocketWorld, agent: Actor) -> None:
    """An ICMP datagram socket, which connects and sends past the other hooks, is not made (threat 2)."""
    for family, protocol in ((socket.AF_INET, socket.IPPROTO_ICMP), (V6, socket.IPPROTO_ICMPV6)):
        assert agent.error("make", family, socket.SOCK_DGRAM, protocol) == "EACCES"


@pytest.mark.parametrize(
    ("level", "name", "value"),
    [
        (socket.IPPROTO_IP, 4, "8307040a0000fe00"),  # IP_OPTIONS: loose source route
        (socket.IPPROTO_IP, 19, "01000000"),  # IP_TRANSPARENT
        (socket.IPPROTO_IPV6, socket.IPV6_RTHDR, ""),
        (socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, ""),
        (socket.IPPROTO_IPV6, socket.IPV6_HOPOPTS, ""),
        (socket.IPPROTO_IPV6, socket.IPV6_RTHDRDSTOPTS, ""),
        (socket.IPPROTO_IPV6, 6, ""),  # IPV6_2292PKTOPTIONS
        (socket.IPPROTO_IPV6, 75, "01000000"),  # IPV6_TRANSPARENT
        (socket.SOL_SOCKET, socket.SO_MARK, "01000000"),
    ],
)
def test_dangerous_options_are_refused(world: SocketWorld, agent: Actor, level: int, name: int, value: str) -> None:
    """Options that route, forge or mark are refused, and the record names the option (threats 3, 10, 13)."""
    handle = agent.udp(V6 if level == socket.IPPROTO_IPV6 else socket.AF_INET)

    assert agent.error("option", handle, level, name, value) == "EACCES"
    (event,) = world.events()
    assert (REASONS[event.reason], event.port, event.proxy_port) == ("socket_option", name, level)


def test_ordinary_options_pass(world: SocketWorld, agent: Actor) -> None:
    """Options that do no harm work, also with values longer than a page."""
    handle = agent.tcp()
    agent("option", handle, socket.SOL_SOCKET, socket.SO_KEEPALIVE, "01000000")
    agent("option", handle, socket.IPPROTO_TCP, socket.TCP_NODELAY, "01000000")
    agent("option", handle, socket.SOL_SOCKET, socket.SO_KEEPALIVE, "01000000" + "00" * 8000)

    assert world.decisions() == []


@pytest.mark.parametrize(
    ("family", "addr", "level", "kind", "value", "reason"),
    [
        (socket.AF_INET, "127.0.0.1", socket.IPPROTO_IP, 7, "01010100", "ip_options"),  # IP_RETOPTS: no-operations
        (V6, "::1", socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, "0000010400000000", "protocol"),
        (V6, "::1", socket.IPPROTO_IPV6, socket.IPV6_HOPOPTS, "0000010400000000", "protocol"),
    ],
)
def test_options_by_ancillary_data_do_not_leave(
    world: SocketWorld, agent: Actor, family: int, addr: str, level: int, kind: int, value: str, reason: str
) -> None:
    """Headers asked for with a single datagram are stopped by the packet backstop, loopback or not (threats 3, 13)."""
    receiver, sender = agent.udp(family), agent.udp(family)
    agent("bind", receiver, addr, 6000)

    assert agent.error("send_with", sender, "x", addr, 6000, level, kind, value) == "EPERM"
    assert agent.error("receive", receiver, 0.1) == "TIMEOUT"
    assert world.decisions() == [f"denied {reason}"]


def test_own_loopback_works(world: SocketWorld, agent: Actor) -> None:
    """Sockets of one agent talk over loopback, both families, without a record each."""
    for family, addr in ((socket.AF_INET, "127.0.0.1"), (V6, "::1")):
        server, client = agent.tcp(family), agent.tcp(family)
        agent("bind", server, addr, 8080)
        agent("listen", server)
        agent("connect", client, addr, 8080)
        accepted = agent("accept", server)
        agent("send", client, "over loopback")
        assert agent("receive", accepted)[0] == "over loopback"
        receiver, sender = agent.udp(family), agent.udp(family)
        agent("bind", receiver, addr, 8081)
        agent("sendto", sender, "datagram", addr, 8081)
        assert agent("receive", receiver)[0] == "datagram"

    assert world.decisions() == []


def test_loopback_by_interface(world: SocketWorld, agent: Actor) -> None:
    """127.0.0.1 bound to a real device is a way out, not loopback (threat 15)."""
    handle = agent.udp()
    agent("option", handle, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0".hex())

    assert agent.error("sendto", handle, "x", "127.0.0.1", 9000) in ("EPERM", "ENETUNREACH", "EINVAL")
    assert set(world.decisions()) <= {"denied no_route"}


def test_own_address_is_not_loopback_to_the_hook(world: SocketWorld, agent: Actor) -> None:
    """The agent's own address lies in the reserved subnet: a connect to it is refused."""
    assert agent.error("connect", agent.tcp(), AGENT, 8080) == "ECONNREFUSED"
