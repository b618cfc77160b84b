"""What rules on addresses and networks compile to (contract 7.6, 7.8; R9, R12)."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.firewall.plan import TCP, UDP, RouteAction, Topology
from clawker_cp.firewall.rules import Rule
from clawker_cp.testing.plan_world import build, deny, problems, rule, world

NET = ipaddress.ip_network


def test_an_opaque_address_rule_has_a_dedicated_listener() -> None:
    """Bytes to that address and port (D31)."""
    w = world(rule("tcp://203.0.113.7:22"), rule("udp://203.0.113.7:53"))
    assert w.address("203.0.113.7", 22) == "203.0.113.7:22"
    assert w.address("203.0.113.7", 53, UDP) == "203.0.113.7:53"
    assert w.address("203.0.113.7", 53) == "none"
    assert w.address("203.0.113.8", 22) == "none"


def test_an_http_address_rule_has_a_listener_that_reads() -> None:
    """With the paths of its policy."""
    w = world(rule("https://203.0.113.7/a"))
    assert w.address("203.0.113.7", 443) == "http 203.0.113.7:443"
    (origin,) = w.policy.origins
    assert origin.is_address and origin.listen and origin.http is not None and origin.http.entries
    assert w.address("203.0.113.7", 443, UDP) == "none"


def test_http_and_https_of_one_address_and_port_share_its_listener() -> None:
    """The listener tells TLS from plain."""
    w = world(rule("https://203.0.113.7:8080"), rule("http://203.0.113.7:8080"))
    assert len({origin.listen for origin in w.policy.origins}) == 1
    assert {origin.tls for origin in w.policy.origins} == {True, False}


def test_a_passthrough_address_is_opaque() -> None:
    """There is nothing to read by."""
    w = world(rule("https://203.0.113.7", tls="passthrough"))
    assert w.address("203.0.113.7", 443) == "203.0.113.7:443"


@pytest.mark.parametrize("proto", ["tcp", "ssh", "http", "https"])
def test_a_network_goes_straight_through(proto: str) -> None:
    """No proxy (D32)."""
    w = world(rule(f"{proto}://198.51.100.0/24:99"))
    assert w.address("198.51.100.200", 99) == "pass"
    assert w.address("198.51.100.200", 98) == "none"
    assert w.address("198.51.101.0", 99) == "none"


def test_a_network_on_https_speaks_for_http3_too_unless_a_udp_rule_owns_the_port() -> None:
    """As for names."""
    assert world(rule("198.51.100.0/24")).address("198.51.100.1", 443, UDP) == "pass"
    owned = world(rule("198.51.100.0/24"), deny("udp://0.0.0.0/0:443"))
    assert owned.address("198.51.100.1", 443, UDP) == "deny"
    assert owned.address("198.51.100.1", 443) == "pass"


def test_the_longest_prefix_decides_and_deny_at_equality() -> None:
    """Before any allow of a shorter prefix."""
    w = world(
        rule("tcp://198.51.100.0/24:1-100"),
        deny("tcp://198.51.100.64/26:1-100"),
        rule("tcp://198.51.100.65:50"),
        deny("tcp://203.0.113.0/24:9"),
        rule("tcp://203.0.113.0/24:9"),
    )
    assert w.address("198.51.100.1", 50) == "pass"
    assert w.address("198.51.100.64", 50) == "deny"
    assert w.address("198.51.100.65", 50) == "198.51.100.65:50"
    assert w.address("198.51.100.65", 51) == "deny"
    assert w.address("203.0.113.1", 9) == "deny"


def test_a_long_prefix_never_hides_a_short_ones_other_ports() -> None:
    """Rows are flattened (R9)."""
    w = world(rule("tcp://198.51.100.0/24:1-100"), rule("tcp://198.51.100.7:200"), deny("tcp://198.51.0.0/16:300"))
    assert w.address("198.51.100.7", 50) == "pass"
    assert w.address("198.51.100.7", 200) == "198.51.100.7:200"
    assert w.address("198.51.100.7", 300) == "deny"


def test_up_to_sixteen_spans_fit_in_a_row() -> None:
    """Apart from each other."""
    rules = [rule(f"tcp://198.51.100.0/24:{port}") for port in range(1, 30, 2)]
    (row,) = build(*rules).plan.cidrs.values()
    assert len(row.spans) == 15


def test_more_than_sixteen_spans_are_a_capacity_problem() -> None:
    """That names the prefix."""
    (found,) = problems(*(rule(f"tcp://198.51.100.0/24:{port}") for port in range(1, 35, 2)))
    assert (found.code, found.field) == ("CAPACITY", "port") and "198.51.100.0/24" in found.text


def test_infrastructure_is_carved_out_of_networks() -> None:
    """R12: the agents' subnet, the host's addresses."""
    topology = Topology(reserved=(NET("10.231.80.0/20"), NET("192.0.2.1/32")))
    w = world(rule("tcp://0.0.0.0/0:1-65535"), topology=topology)
    assert w.address("10.231.81.5", 80) == "deny"
    assert w.address("192.0.2.1", 22) == "deny"
    assert w.address("192.0.2.2", 22) == "pass"


def test_a_rule_inside_the_infrastructure_has_no_effect_and_a_warning() -> None:
    """Also when the rule is longer than the reserved prefix."""
    topology = Topology(reserved=(NET("10.231.80.0/20"),))
    compiled = build(rule("tcp://10.231.81.5:22"), rule("10.231.80.0/20"), topology=topology)
    assert compiled.plan.cidrs == {}
    assert len(compiled.warnings) == 2


def test_ipv6_addresses_and_networks_compile_like_ipv4() -> None:
    """With a warning while nothing routes them."""
    compiled = build(rule("tcp://[2001:db8::1]:22"), rule("tcp://[2001:db8:1::]/48:1-9"))
    assert {row.prefix for row in compiled.plan.cidrs.values()} == {NET("2001:db8::1"), NET("2001:db8:1::/48")}
    assert any("IPv6" in text for text in compiled.warnings)
    assert build(rule("tcp://[2001:db8::1]:22"), topology=Topology(ipv6=True)).warnings == ()


def test_an_opaque_and_an_http_rule_on_one_address_and_port_conflict() -> None:
    """As on names."""
    (found,) = problems(rule("https://203.0.113.7"), rule("tcp://203.0.113.7:443"))
    assert (found.index, found.field) == (1, "port")


def test_policies_share_opaque_address_listeners_but_not_reading_ones() -> None:
    """Paths differ by policy."""
    compiled = build(
        rule("tcp://203.0.113.7:22"),
        rule("https://203.0.113.7/a"),
        rule("https://203.0.113.7/b", scope="project:p"),
    )
    one, two = compiled.plan.policies[1], compiled.plan.policies[2]
    assert one.opaque == two.opaque
    assert {origin.listen for origin in one.origins}.isdisjoint(origin.listen for origin in two.origins)


def test_address_rows_carry_deadline_and_rule() -> None:
    """Like name rows."""
    grant = rule("tcp://203.0.113.7:22", expires_at=2000.0)
    compiled = build(grant)
    (row,) = compiled.plan.cidrs.values()
    assert row.spans[0].expires_at == 2000.0
    assert compiled.plan.rule_ids[row.spans[0].rule] == grant.id


PREFIXES = ["0.0.0.0/0", "198.51.100.0/24", "198.51.100.0/25", "198.51.100.128/26", "198.51.100.5/32", "198.51.100.5"]
RULES = st.builds(
    lambda dst, proto, low, width, action: rule(f"{proto}://{dst}:{low}-{low + width}", action),
    st.sampled_from(PREFIXES),
    st.sampled_from(["tcp", "udp"]),
    st.integers(1, 8),
    st.integers(0, 3),
    st.sampled_from(["allow", "deny"]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(RULES, max_size=7), st.sampled_from(["198.51.100.5", "198.51.100.6", "198.51.100.130", "192.0.2.1"]))
def test_flattened_rows_say_what_the_rules_say(rules: list[Rule], address: str) -> None:
    """Oracle: the longest prefix among the rules that hold address and port; deny at equality."""
    w = world(*rules)
    for l4, proto in ((TCP, "tcp"), (UDP, "udp")):
        for port in range(1, 12):
            here = [
                one
                for one in rules
                if one.proto == proto
                and ipaddress.ip_address(address) in NET(one.dst)
                and int(one.port.split("-")[0]) <= port <= int(one.port.split("-")[-1])
            ]
            best = max(here, key=lambda one: (NET(one.dst).prefixlen, one.is_deny, "/" not in one.dst), default=None)
            expected = "none" if best is None else "deny" if best.is_deny else "pass"
            if best is not None and not best.is_deny and "/" not in best.dst:
                expected = f"{best.dst}:{port}"
            assert w.address(address, port, l4) == expected


def test_no_span_is_left_without_an_action() -> None:
    """Deny spans of carved infrastructure have no rule."""
    compiled = build(rule("10.0.0.0/8"), topology=Topology(reserved=(NET("10.231.80.0/20"),)))
    (span,) = compiled.plan.cidrs[1, TCP, NET("10.231.80.0/20")].spans
    assert (span.action, span.rule, span.low, span.high) == (RouteAction.DENY, -1, 1, 65535)
