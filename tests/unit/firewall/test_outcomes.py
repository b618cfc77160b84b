"""Decisions per port of a name (contract 7.6, 7.8)."""

from __future__ import annotations

from dataclasses import replace

from clawker_cp.firewall.effective import RuleIndex, read_rule
from clawker_cp.firewall.outcomes import PortOutcome, decide_port, decide_ports
from clawker_cp.firewall.rules import PROTO_ANY, Rule
from clawker_cp.testing.plan_world import deny, rule


def outcome(name: str, port: int, *rules: Rule) -> PortOutcome:
    """Decide one port of one name."""
    return decide_port(RuleIndex(map(read_rule, rules)).candidates(name), port)


def test_a_port_that_no_rule_names_has_no_decider() -> None:
    """And nothing is left of it."""
    found = outcome("x.com", 444, rule("x.com"))
    assert (found.opaque, found.tls, found.plain, found.udp, found.left) == (None, None, None, None, False)


def test_an_opaque_deny_of_equal_rank_beats_what_the_proxy_reads() -> None:
    """And the proxy is told to deny too."""
    found = outcome("x.com", 443, rule("x.com"), deny("tcp://x.com:443"))
    assert found.opaque is not None and found.opaque.deny and not found.to_proxy
    assert found.tls is not None and found.tls.denied_by is found.opaque


def test_an_http_deny_of_equal_rank_beats_an_opaque_allow() -> None:
    """The port goes to the proxy, which refuses."""
    found = outcome("x.com", 443, rule("tcp://x.com:443"), deny("x.com"))
    assert found.to_proxy and not found.left and found.conflict is None


def test_two_allows_of_one_dst_that_contradict_are_a_conflict() -> None:
    """Only at the port they share."""
    rules = (rule("tcp://x.com:440-450"), rule("x.com"))
    assert outcome("x.com", 443, *rules).conflict is not None
    assert outcome("x.com", 444, *rules).conflict is None


def test_http3_is_spoken_where_tls_is_inspected_and_no_udp_rule_owns_the_port() -> None:
    """Not for passthrough, plain http or denied names."""
    assert outcome("x.com", 443, rule("x.com")).quic
    assert not outcome("x.com", 443, rule("x.com", tls="passthrough")).quic
    assert not outcome("x.com", 80, rule("http://x.com")).quic
    assert not outcome("x.com", 443, rule("x.com"), rule("udp://*.com:443")).quic
    assert not outcome("x.com", 443, deny("x.com")).quic


def test_a_widened_deny_leaves_only_narrower_allows() -> None:
    """On every port."""
    wide = replace(deny("x.com"), proto=PROTO_ANY, port="")
    index = RuleIndex(map(read_rule, [wide, rule("ssh://x.com"), rule("www.x.com"), rule("*.x.com")]))
    assert not any(one.left for one in decide_ports(index.candidates("x.com")))
    assert [(one.low, one.high) for one in decide_ports(index.candidates("www.x.com")) if one.left] == [(443, 443)]


def test_the_allows_and_denials_of_an_outcome_are_its_deciders() -> None:
    """For naming the rule of a verdict."""
    found = outcome("x.com", 443, rule("x.com"), deny("udp://x.com:443"))
    assert [one.rule.proto for one in found.allows()] == ["https"]
    assert [one.rule.proto for one in found.denials()] == ["udp"]
