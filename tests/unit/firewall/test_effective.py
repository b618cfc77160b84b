"""Effective rules of an agent, their order and what is left of them (contract 2.4, 7.6)."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.firewall.effective import RuleIndex, listing, policy_key, read_rule
from clawker_cp.firewall.rules import Rule
from clawker_cp.testing.plan_world import deny, rule


def test_the_policy_key_is_the_most_specific_scope_present() -> None:
    """A learning agent always has its own."""
    assert policy_key("agent:p/a", ["global", "project:p"]) == "project:p"
    assert policy_key("agent:/a", ["global", "project:p"]) == "global"
    assert policy_key("agent:p/a", [], frozenset({"agent:p/a"})) == "agent:p/a"


def test_listed_most_specific_first_and_deny_before_allow() -> None:
    """Exact before wildcard, more labels before fewer, names before addresses."""
    rules = [rule("*.x.com"), rule("x.com"), rule("10.0.0.0/8"), deny("x.com"), rule("a.b.x.com"), rule("10.0.0.1")]
    assert [(one.rule.dst, one.rule.action) for one in listing(rules)] == [
        ("a.b.x.com", "allow"),
        ("x.com", "deny"),
        ("x.com", "allow"),
        (".x.com", "allow"),
        ("10.0.0.1", "allow"),
        ("10.0.0.0/8", "allow"),
    ]


def test_what_denials_leave_of_a_rules_ports_is_listed_with_the_denier() -> None:
    """allow 4242-4250, deny 4246."""
    closed = deny("tcp://x.com:4246")
    found = {one.rule.action: one for one in listing([rule("tcp://x.com:4242-4250"), closed])}
    assert found["allow"].spans == ((4242, 4245, "tcp"), (4247, 4250, "tcp"))
    assert found["allow"].overridden_by == (closed.id,)
    assert found["deny"].spans == ((4246, 4246, "tcp"),)


def test_a_rule_of_which_nothing_is_left_has_no_spans() -> None:
    """Overridden by a wildcard deny of the same base."""
    found = listing([rule("https://*.x.com"), deny("https://x.com"), rule("https://www.x.com")])
    left = {(one.rule.dst, one.rule.action): one.spans for one in found}
    assert left[".x.com", "allow"] == ()
    assert left["www.x.com", "allow"] == ((443, 443, "tcp"), (443, 443, "udp"))


def test_networks_are_marked_and_http_rules_show_their_path_default() -> None:
    """Opaque ones show none."""
    shown = {
        one.rule.dst: (one.address_level, one.path_default)
        for one in listing([rule("10.0.0.0/8"), rule("x.com"), rule("y.com/a"), rule("ssh://z.com"), deny("q.com")])
    }
    assert shown == {
        "10.0.0.0/8": (True, "allow"),
        "x.com": (False, "allow"),
        "y.com": (False, "deny"),
        "z.com": (False, ""),
        "q.com": (False, "deny"),
    }


BASES = st.sampled_from(["com", "x.com", "a.x.com", "b.a.x.com"])
SOME = st.builds(
    lambda base, wild, action: rule(("*." if wild else "") + base, action),
    BASES,
    st.booleans(),
    st.sampled_from(["allow", "deny"]),
)


@settings(deadline=None)
@given(st.lists(SOME, max_size=6), st.sampled_from(["x.com", "a.x.com", "q.a.x.com", "b.a.x.com", "com", "org"]))
def test_candidates_are_the_matching_rules_most_decisive_first(rules: list[Rule], name: str) -> None:
    """Oracle: test every rule against the name."""
    expected = set()
    for one in rules:
        base, wildcard = one.dst.removeprefix("."), one.dst.startswith(".")
        if name == base or (name.endswith("." + base) and (wildcard or one.is_deny)):
            expected.add((base.count(".") + 1 + (not wildcard and name == base), int(one.is_deny), one.id))
    found = [(*c.rank, c.facts.id) for c in RuleIndex(map(read_rule, rules)).candidates(name)]
    assert set(found) == expected
    assert [entry[:2] for entry in found] == sorted((entry[:2] for entry in found), reverse=True)
