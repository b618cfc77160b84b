"""The decisions of bpf/lib, by cases: what a socket may open, and what a packet may do."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from clawker_cp.ebpf.config import AgentConfig
from clawker_cp.testing.bpf_abi import ABI
from clawker_cp.testing.bpf_cases import BASE, TCP, UDP, Decisions

pytestmark = pytest.mark.root

GATEWAY = BASE.proxy_addr
LEARN = replace(BASE, learn=True)
QUARANTINED = replace(BASE, quarantined=True)
V6 = replace(BASE, ipv6=True)


def bypassed(seconds: float = 60.0) -> AgentConfig:
    return replace(BASE, bypass_until_ns=time.monotonic_ns() + int(seconds * 1e9))


def test_not_enrolled_is_denied(kernel: Decisions) -> None:
    """A cgroup that nobody enrolled gets nothing, not even loopback or DNS (I1, I4)."""
    for addr, port in (("203.0.113.7", 443), ("127.0.0.1", 80), ("8.8.8.8", 53), (GATEWAY, 7444), ("::1", 1)):
        assert str(kernel.flow(addr, port, config=None)) == "denied not_enrolled"


def test_not_enrolled_passes_when_enforcement_is_off(kernel: Decisions) -> None:
    """Only the operator's switch lets a cgroup pass that nobody enrolled; an enrolled one is still judged."""
    kernel.control(enforce=False)

    assert str(kernel.flow("203.0.113.7", 443, config=None)) == "allowed none"
    assert str(kernel.flow("203.0.113.7", 443)) == "denied no_route"


def test_unwritten_control_enforces(kernel: Decisions) -> None:
    """A control row that was never written is not a switch turned off."""
    kernel.maps["control"].put(bytes(4), bytes(len(kernel.maps["control"].get(bytes(4)) or b"")))

    assert str(kernel.flow("203.0.113.7", 443, config=None)) == "denied not_enrolled"


@pytest.mark.parametrize("l4", [0, 1, 2, 33, 58, 132, 136, 255])
def test_other_protocols_are_denied(kernel: Decisions, l4: int) -> None:
    """What is neither TCP nor UDP is denied before anything else is asked, also on port 53."""
    assert str(kernel.flow("203.0.113.7", 53, l4)) == "denied protocol"


@pytest.mark.parametrize("l4", [TCP, UDP])
@pytest.mark.parametrize("addr", ["8.8.8.8", "127.0.0.1", "127.0.0.11", "127.0.0.53", GATEWAY, "0.0.0.0"])
@pytest.mark.parametrize("config", [BASE, LEARN, QUARANTINED], ids=["plain", "learn", "quarantined"])
def test_port_53_goes_to_the_gate(kernel: Decisions, addr: str, l4: int, config: AgentConfig) -> None:
    """Whoever is asked on port 53, the gate answers; also while quarantined (R16)."""
    answer = kernel.flow(addr, 53, l4, config=config)

    assert (str(answer), answer.to_gate) == ("redirected dns 53", True)


def test_port_53_goes_to_the_gate_during_a_bypass(kernel: Decisions) -> None:
    """A bypass does not end the gate's view of names (R15)."""
    assert str(kernel.flow("8.8.8.8", 53, UDP, config=bypassed())) == "redirected dns 53"


@pytest.mark.parametrize("addr", ["::1", "2001:db8::7", "2001:4860:4860::8888"])
def test_native_ipv6_cannot_be_sent_to_an_ipv4_gate(kernel: Decisions, addr: str) -> None:
    """A question on native IPv6 is refused at once with its reason: the gate speaks IPv4 (R7)."""
    assert str(kernel.flow(addr, 53, UDP)) == "denied ipv6_unrouted"


@pytest.mark.parametrize("addr", ["127.0.0.1", "127.255.0.9", "0.0.0.0", "::1", "::"])
def test_loopback_passes(kernel: Decisions, addr: str) -> None:
    """The agent's own loopback is its own business, quarantined or not."""
    assert str(kernel.flow(addr, 8080)) == "allowed loopback"
    assert str(kernel.flow(addr, 8080, UDP, config=QUARANTINED)) == "allowed loopback"


def test_engine_resolver_is_not_loopback(kernel: Decisions) -> None:
    """127.0.0.11 answers for somebody else: denied on every port but 53, bypass or not (threat 33)."""
    assert str(kernel.flow("127.0.0.11", 41234, UDP)) == "denied engine_resolver"
    assert str(kernel.flow("127.0.0.11", 41234, config=bypassed())) == "denied engine_resolver"


@pytest.mark.parametrize(
    ("port", "l4", "expected"),
    [
        (7444, TCP, "allowed infrastructure"),
        (4444, TCP, "allowed infrastructure"),
        (7080, TCP, "allowed infrastructure"),
        (7444, UDP, "denied no_route"),
        (7443, TCP, "denied no_route"),
        (22, TCP, "denied no_route"),
        (10000, TCP, "denied proxy_port"),
        (12001, TCP, "denied proxy_port"),
        (9902, TCP, "denied no_route"),
        (0, TCP, "denied no_route"),
    ],
)
def test_infrastructure_is_exact_tuples(kernel: Decisions, port: int, l4: int, expected: str) -> None:
    """Of the gateway an agent reaches the named tuples and nothing else; listeners not directly (threat 20)."""
    assert str(kernel.flow(GATEWAY, port, l4)) == expected


def test_host_proxy_only_when_configured(kernel: Decisions) -> None:
    """The host proxy is reachable when the config has it, never while quarantined, never for UDP."""
    config = replace(BASE, host_proxy_addr="10.231.80.9", host_proxy_port=18374)

    assert str(kernel.flow("10.231.80.9", 18374, config=config)) == "allowed infrastructure"
    assert str(kernel.flow("10.231.80.9", 18374, UDP, config=config)) == "denied no_route"
    assert str(kernel.flow("10.231.80.9", 18375, config=config)) == "denied no_route"
    assert str(kernel.flow("10.231.80.9", 18374)) == "denied no_route"
    assert str(kernel.flow("10.231.80.9", 18374, config=replace(config, quarantined=True))) == "denied quarantined"


def test_quarantine_leaves_the_control_plane(kernel: Decisions) -> None:
    """Quarantined: loopback, the gate and the control plane; routes, bypass and learning say nothing (R16)."""
    kernel.name(5, "203.0.113.7", 300)
    kernel.route(300, 443, to=10000)
    config = replace(QUARANTINED, learn=True, bypass_until_ns=time.monotonic_ns() + 10**11)

    assert str(kernel.flow(GATEWAY, 7444, config=config)) == "allowed infrastructure"
    assert str(kernel.flow("203.0.113.7", 443, config=config)) == "denied quarantined"
    assert str(kernel.flow("203.0.113.99", 443, UDP, config=config)) == "denied quarantined"


def test_ipv6_is_denied_with_its_reason_until_routed(kernel: Decisions) -> None:
    """Native IPv6 is refused at once even with a rule, and judged like IPv4 once the network routes it (R7)."""
    kernel.cidr("2001:db8::/32", [(443, 443, ABI.ACT_PASS)])

    assert str(kernel.flow("2001:db8::7", 443)) == "denied ipv6_unrouted"
    assert str(kernel.flow("2001:db8::7", 443, config=V6)) == "allowed address_rule"
    assert str(kernel.flow("2001:db8::7", 444, config=V6)) == "denied no_route"


@pytest.mark.parametrize(
    "addr", ["10.231.80.77", "192.0.2.1", "224.0.0.1", "239.255.255.250", "255.255.255.255", GATEWAY]
)
@pytest.mark.parametrize("mode", ["rule", "bypass", "learn"])
def test_reserved_addresses_are_out_of_reach(kernel: Decisions, addr: str, mode: str) -> None:
    """What is ours, the host's or a group's is denied before any rule, bypass or learning (R12)."""
    kernel.reserve("10.231.80.0/20")
    kernel.reserve("192.0.2.1/32")
    kernel.cidr("0.0.0.0/0", [(0, 65535, ABI.ACT_PASS)])
    kernel.cidr(f"{addr}/32", [(0, 65535, ABI.ACT_PASS)])
    config = {"rule": BASE, "bypass": bypassed(), "learn": LEARN}[mode]

    assert str(kernel.flow(addr, 8443, config=config)) == "denied no_route"
    assert str(kernel.packet(addr, 8443, config=config)).startswith("denied")


@pytest.mark.parametrize("addr", ["64:ff9b::10.231.80.77", "2002:ae7:504d::1", "ff02::1", "64:ff9b::127.0.0.1"])
def test_translated_forms_are_judged_as_what_they_carry(kernel: Decisions, addr: str) -> None:
    """A NAT64 or 6to4 form of a reserved address is reserved (R12)."""
    kernel.reserve("10.231.80.0/20")
    kernel.cidr("::/0", [(0, 65535, ABI.ACT_PASS)])

    assert str(kernel.flow(addr, 443, config=V6)) == "denied no_route"
    assert str(kernel.flow("64:ff9b::203.0.113.7", 443, config=V6)) == "allowed address_rule"


def test_bypass_passes_until_its_deadline(kernel: Decisions) -> None:
    """A bypass lets public destinations pass by the kernel's clock alone (I3)."""
    assert str(kernel.flow("203.0.113.7", 443, config=bypassed())) == "bypassed bypass"
    assert str(kernel.packet("203.0.113.7", 443, UDP, config=bypassed())) == "bypassed bypass"
    assert str(kernel.flow("203.0.113.7", 443, config=bypassed(-0.001))) == "denied no_route"
    assert str(kernel.packet("203.0.113.7", 443, config=bypassed(-0.001))) == "denied no_route"


def test_name_route_redirects_to_its_listener(kernel: Decisions) -> None:
    """A learnt name's port goes to the listener of its row; other ports, protocols, agents do not."""
    kernel.name(5, "203.0.113.7", 300)
    kernel.route(300, 22, to=10001, rule=3)

    answer = kernel.flow("203.0.113.7", 22)

    assert (str(answer), answer.identity, answer.rule) == ("redirected name_route 10001", 300, 3)
    assert str(kernel.flow("203.0.113.7", 23)) == "denied no_route"
    assert str(kernel.flow("203.0.113.7", 22, UDP)) == "denied no_route"
    assert str(kernel.flow("203.0.113.8", 22)) == "denied no_route"
    assert str(kernel.flow("203.0.113.7", 22, cgroup=6)) == "denied no_route"
    assert str(kernel.flow("203.0.113.7", 22, config=replace(BASE, policy=2))) == "denied no_route"


def test_rows_of_another_generation_do_not_count(kernel: Decisions) -> None:
    """Only rows of the generation that the control word names decide (R10)."""
    kernel.name(5, "203.0.113.7", 300)
    kernel.route(300, 22, to=10001)
    kernel.cidr("203.0.113.0/24", [(80, 80, ABI.ACT_PASS)])
    kernel.listener(10001)
    assert str(kernel.packet(GATEWAY, 10001)) == "allowed name_route"

    kernel.next_generation()

    assert str(kernel.flow("203.0.113.7", 22)) == "denied no_route"
    assert str(kernel.flow("203.0.113.7", 80)) == "denied no_route"
    assert str(kernel.packet(GATEWAY, 10001)) == "denied proxy_port"


def test_expired_names_do_not_open_new_flows(kernel: Decisions) -> None:
    """An address is known for as long as its answer lives."""
    kernel.route(300, 22, to=10001)
    kernel.name(5, "203.0.113.7", 300, lives_s=-0.1)

    assert str(kernel.flow("203.0.113.7", 22)) == "denied no_route"


def test_expired_routes_say_so(kernel: Decisions) -> None:
    """A rule's end is kept by the kernel, with its own reason, for names, prefixes and packets."""
    past, future = time.monotonic_ns() - 1, time.monotonic_ns() + 10**11
    kernel.name(5, "203.0.113.7", 300)
    kernel.route(300, 22, to=10001, deadline_ns=past)
    kernel.route(300, 23, to=10002, deadline_ns=future)
    kernel.cidr("198.51.100.0/24", [(1, 9, ABI.ACT_PASS, 0, 4, past), (10, 19, ABI.ACT_PASS, 0, 4, future)])

    assert str(kernel.flow("203.0.113.7", 22)) == "denied route_expired"
    assert str(kernel.flow("203.0.113.7", 23)) == "redirected name_route 10002"
    assert str(kernel.flow("198.51.100.1", 5)) == "denied route_expired"
    assert str(kernel.packet("198.51.100.1", 5)) == "denied route_expired"
    assert str(kernel.packet("198.51.100.1", 15)) == "allowed address_rule"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({300: (ABI.ACT_PROXY, 10001), 301: (ABI.ACT_PROXY, 10002)}, "redirected name_route 10001"),
        ({301: (ABI.ACT_PROXY, 10002)}, "redirected name_route 10002"),
        ({300: (ABI.ACT_PROXY, 10001), 301: (ABI.ACT_DENY, 0)}, "denied rule_deny"),
        (
            {300: (ABI.ACT_PROXY, 10001), 301: (ABI.ACT_DENY, 0), 2: (ABI.ACT_PROXY, 12000)},
            "redirected name_route 12000",
        ),
        ({300: (ABI.ACT_DENY, 0), 303: (ABI.ACT_PROXY, 10000)}, "redirected name_route 10000"),
        ({303: (ABI.ACT_PROXY, 10003)}, "redirected name_route 10003"),
    ],
    ids=["newest", "whoever has a row", "a deny wins", "http first", "http before deny", "fourth"],
)
def test_names_that_share_an_address(kernel: Decisions, rows: dict[int, tuple[int, int]], expected: str) -> None:
    """HTTP family goes to the egress listener, else a deny wins, else the name answered last (contract 7.8)."""
    identities = (300, 301, 2, 303)
    kernel.name(5, "203.0.113.7", *identities)
    for identity, (action, to) in rows.items():
        kernel.route(identity, 8000, action=action, to=to)

    assert str(kernel.flow("203.0.113.7", 8000)) == expected


def test_address_rules_by_longest_prefix_and_span(kernel: Decisions) -> None:
    """The longest prefix decides with its spans; what it does not name, nobody does (R9 flattens them)."""
    kernel.cidr("203.0.113.0/24", [(1, 1023, ABI.ACT_PASS, 0, 1), (5432, 5432, ABI.ACT_PROXY, 10005, 2)])
    kernel.cidr("203.0.113.64/26", [(22, 22, ABI.ACT_DENY, 0, 3), (1, 1023, ABI.ACT_PASS, 0, 1)])
    kernel.cidr("203.0.113.0/24", [(123, 123, ABI.ACT_PASS, 0, 5)], UDP)

    assert str(kernel.flow("203.0.113.1", 22)) == "allowed address_rule"
    assert str(kernel.flow("203.0.113.65", 22)) == "denied rule_deny"
    assert str(kernel.flow("203.0.113.65", 23)) == "allowed address_rule"
    assert str(kernel.flow("203.0.113.65", 5432)) == "denied no_route"
    assert str(kernel.flow("203.0.113.1", 5432)) == "redirected address_rule 10005"
    assert str(kernel.flow("203.0.113.1", 123, UDP)) == "allowed address_rule"
    assert str(kernel.flow("203.0.114.1", 22)) == "denied no_route"
    assert kernel.flow("203.0.113.65", 22).rule == 3


def test_ipv6_prefixes_do_not_cover_ipv4(kernel: Decisions) -> None:
    """::/0 is a rule for IPv6 only, although IPv4 addresses are kept in their mapped form."""
    kernel.cidr("::/0", [(0, 65535, ABI.ACT_PASS)])

    assert str(kernel.flow("203.0.113.7", 443)) == "denied no_route"
    assert str(kernel.packet("203.0.113.7", 443)) == "denied no_route"
    assert str(kernel.flow("2001:db8::7", 443, config=V6)) == "allowed address_rule"


def test_the_sixteenth_span_counts(kernel: Decisions) -> None:
    """All sixteen spans of a prefix are looked at, the gaps between them are closed."""
    kernel.cidr("203.0.113.7/32", [(port, port, ABI.ACT_PASS) for port in range(1000, 1032, 2)])

    assert [p for p in range(999, 1033) if kernel.flow("203.0.113.7", p).verdict == "allowed"] == list(
        range(1000, 1032, 2)
    )


def test_catch_all_only_on_its_ports(kernel: Decisions) -> None:
    """An unknown address goes to the egress listener on ports HTTP rules name, else it is refused (R11)."""
    kernel.route(ABI.ID_CATCH_ALL, 443, to=12000, rule=ABI.NO_RULE)

    assert str(kernel.flow("203.0.113.7", 443)) == "redirected catch_all 12000"
    assert str(kernel.flow("203.0.113.7", 8443)) == "denied no_route"
    assert str(kernel.flow("203.0.113.7", 443, UDP)) == "denied no_route"


def test_address_rules_come_before_the_catch_all(kernel: Decisions) -> None:
    """A rule for the address is more specific than one for every address."""
    kernel.route(ABI.ID_CATCH_ALL, 443, to=12000)
    kernel.cidr("203.0.113.0/24", [(443, 443, ABI.ACT_DENY)])

    assert str(kernel.flow("203.0.113.7", 443)) == "denied rule_deny"
    assert str(kernel.flow("198.51.100.7", 443)) == "redirected catch_all 12000"


def test_learning_passes_what_no_rule_denies(kernel: Decisions) -> None:
    """Learning: rules first, explicit denials hold, the rest passes and is marked (R38)."""
    kernel.name(5, "203.0.113.7", 300)
    kernel.route(300, 22, to=10001)
    kernel.route(300, 23, action=ABI.ACT_DENY)
    kernel.cidr("198.51.100.0/24", [(25, 25, ABI.ACT_DENY)])

    assert str(kernel.flow("203.0.113.7", 22, config=LEARN)) == "redirected name_route 10001"
    assert str(kernel.flow("203.0.113.7", 23, config=LEARN)) == "denied rule_deny"
    assert str(kernel.flow("203.0.113.7", 24, UDP, config=LEARN)) == "allowed learn"
    assert str(kernel.flow("198.51.100.7", 25, config=LEARN)) == "denied rule_deny"
    assert str(kernel.packet("198.51.100.7", 25, config=LEARN)) == "denied rule_deny"
    assert str(kernel.packet("198.51.100.7", 26, config=LEARN)) == "allowed learn"
    assert str(kernel.flow("2001:db8::7", 443, config=LEARN)) == "denied ipv6_unrouted"


@pytest.mark.parametrize(
    ("addr", "port", "l4", "expected"),
    [
        (GATEWAY, 53, UDP, "allowed dns"),
        (GATEWAY, 53, TCP, "allowed dns"),
        (GATEWAY, 7444, TCP, "allowed infrastructure"),
        (GATEWAY, 7444, UDP, "denied proxy_port"),
        (GATEWAY, 10001, TCP, "allowed name_route"),
        (GATEWAY, 10001, UDP, "denied proxy_port"),
        (GATEWAY, 10002, TCP, "denied proxy_port"),
        (GATEWAY, 11001, UDP, "allowed name_route"),
        ("8.8.8.8", 53, UDP, "denied no_route"),
        ("203.0.113.7", 22, TCP, "denied no_route"),
        ("198.51.100.7", 80, TCP, "allowed address_rule"),
        ("198.51.100.7", 81, TCP, "denied no_route"),
        ("198.51.100.7", 82, TCP, "denied rule_deny"),
        ("127.0.0.1", 80, TCP, "denied no_route"),
        ("::1", 80, TCP, "denied ipv6_unrouted"),
        ("2001:db8::7", 80, TCP, "denied ipv6_unrouted"),
    ],
)
def test_backstop(kernel: Decisions, addr: str, port: int, l4: int, expected: str) -> None:
    """Packets go to the gate, infrastructure, this policy's listeners and passed prefixes: nowhere else."""
    kernel.name(5, "203.0.113.7", 300)
    kernel.route(300, 22, to=10001)
    kernel.route(ABI.ID_CATCH_ALL, 443, to=10000)
    kernel.listener(10001)
    kernel.listener(10002, policy=2)
    kernel.listener(11001, UDP)
    kernel.cidr("198.51.100.0/24", [(80, 80, ABI.ACT_PASS), (81, 81, ABI.ACT_PROXY, 10001), (82, 82, ABI.ACT_DENY)])

    assert str(kernel.packet(addr, port, l4)) == expected


def test_backstop_judges_loopback_addresses_as_a_way_out(kernel: Decisions) -> None:
    """A loopback address on another interface is denied even when everything passes (threats 3, 15)."""
    kernel.cidr("0.0.0.0/0", [(0, 65535, ABI.ACT_PASS)])
    kernel.cidr("::/0", [(0, 65535, ABI.ACT_PASS)])

    assert str(kernel.packet("127.0.0.1", 80, config=bypassed())) == "denied no_route"
    assert str(kernel.packet("::1", 80, config=replace(V6, learn=True))) == "denied no_route"


def test_quarantine_closes_open_connections(kernel: Decisions) -> None:
    """The backstop knows quarantine: a listener that was fine a packet ago is not any more."""
    kernel.listener(10001)

    assert str(kernel.packet(GATEWAY, 10001)) == "allowed name_route"
    assert str(kernel.packet(GATEWAY, 10001, config=QUARANTINED)) == "denied quarantined"
    assert str(kernel.packet(GATEWAY, 53, UDP, config=QUARANTINED)) == "allowed dns"


def test_inbound_only_to_published_ports(kernel: Decisions) -> None:
    """A SYN is admitted by port and source; only connections it opened have packets (R9)."""
    kernel.publish(5, 80, ABI.IN_HOST)
    kernel.publish(5, 81, ABI.IN_ANY)
    kernel.publish(5, 7700, ABI.IN_CP)

    assert kernel.inbound(GATEWAY, 40000, 80) == 0
    assert kernel.inbound(GATEWAY, 40000, 80, opens=True) == 1
    assert kernel.inbound(GATEWAY, 40000, 80, opens=True) == 2
    assert kernel.inbound(GATEWAY, 40000, 80, outgoing=True) == 2
    assert kernel.inbound(GATEWAY, 40001, 80, outgoing=True) == 0
    assert kernel.inbound("203.0.113.7", 40000, 80, opens=True) == 0
    assert kernel.inbound("203.0.113.7", 40000, 81, opens=True) == 1
    assert kernel.inbound(GATEWAY, 40000, 7700, opens=True) == 1
    assert kernel.inbound(GATEWAY, 40000, 82, opens=True) == 0
    assert kernel.inbound(GATEWAY, 40000, 80, opens=True, cgroup=6) == 0
    assert kernel.inbound(GATEWAY, 40000, 80, opens=True, l4=UDP) == 0


def test_an_outgoing_syn_is_never_a_reply(kernel: Decisions) -> None:
    """From a published port an agent cannot dial whoever once dialled it."""
    kernel.publish(5, 80, ABI.IN_ANY)
    assert kernel.inbound("203.0.113.7", 40000, 80, opens=True) == 1

    assert kernel.inbound("203.0.113.7", 40000, 80, opens=True, outgoing=True) == 0


def test_unpublishing_and_quarantine_close_inbound_connections(kernel: Decisions) -> None:
    """A published connection lives as long as its port is published; quarantine leaves the control plane's (R16)."""
    kernel.publish(5, 80, ABI.IN_HOST)
    kernel.publish(5, 7700, ABI.IN_CP)
    assert kernel.inbound(GATEWAY, 40000, 80, opens=True) == 1
    assert kernel.inbound(GATEWAY, 40000, 7700, opens=True) == 1

    assert kernel.inbound(GATEWAY, 40000, 80, config=QUARANTINED) == 0
    assert kernel.inbound(GATEWAY, 40000, 7700, config=QUARANTINED) == 2
    kernel.publish(5, 80, ABI.IN_NONE)
    assert kernel.inbound(GATEWAY, 40000, 80) == 0
