"""Hosts of a policy, and connections over a change (contract 6.1, R13)."""

from __future__ import annotations

from hypothesis import event, given, settings
from hypothesis import strategies as st

from clawker_cp.firewall.allocations import EMPTY
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.hosts import HostTable, may_stay, takes_nothing
from clawker_cp.firewall.plan import TCP, DeniedHost, Passthrough, Topology
from clawker_cp.firewall.rules import Rule
from clawker_cp.testing.plan_world import World, build, deny, rule


def table(*rules: Rule) -> HostTable:
    """Policy 1 of some rules."""
    return HostTable.of(build(*rules).plan.policies[1])


def test_a_host_is_found_exactly_or_below_the_longest_base() -> None:
    """In any case; None where nothing speaks for it."""
    hosts = table(rule("*.x.com"), rule("www.x.com/a"), deny("evil.x.com"), rule("p.com", tls="passthrough"))
    assert hosts.allows("A.B.x.com.", 443, tls=True)
    assert isinstance(hosts.find("a.evil.x.com", 443, tls=True), DeniedHost)
    assert isinstance(hosts.find("p.com", 443, tls=True), Passthrough)
    assert hosts.find("x.com", 443, tls=False) is None
    assert hosts.find("y.com", 443, tls=True) is None
    assert not hosts.allows("evil.x.com", 443, tls=True)


def test_unread_destinations_are_found_by_transport_name_and_port() -> None:
    """Names and addresses."""
    hosts = table(rule("ssh://x.com"), rule("tcp://203.0.113.7:5"))
    assert hosts.reaches(TCP, "x.com", 22) and hosts.reaches(TCP, "203.0.113.7", 5)
    assert not hosts.reaches(TCP, "x.com", 23)


def test_within_a_policy_a_host_that_stays_allowed_keeps_its_connections() -> None:
    """Whatever happened to its paths; one that is denied or gone does not."""
    before = table(rule("x.com"), rule("y.com"), rule("z.com"))
    after = table(rule("x.com/only"), deny("y.com"))
    assert [may_stay(before, after, f"{name}.com", 443, tls=True) for name in "xyz"] == [True, False, False]


def test_a_connection_does_not_stay_when_reading_begins() -> None:
    """What was passed through was never judged."""
    assert not may_stay(table(rule("x.com", tls="passthrough")), table(rule("x.com")), "x.com", 443, tls=True)


def test_an_addition_takes_nothing_unless_it_speaks_for_what_was_spoken_for() -> None:
    """A rule that is gone, another path, a denial or a way of reading below a wildcard each may take something."""
    before = [rule("*.x.com"), rule("y.com"), rule("ssh://z.com")]
    told = {
        added: takes_nothing(table(*before), table(*before, *more))
        for added, more in {
            "nothing": [], "a host": [rule("n.com")], "a subtree": [rule("*.n.com")], "a listener": [rule("ssh://n.com")],
            "a path below": [rule("a.x.com/only")], "a denial below": [deny("a.x.com")],
            "unread below": [rule("a.x.com", tls="passthrough")], "a denied path": [deny("y.com/secret")],
        }.items()
    }  # fmt: skip
    assert [added for added, nothing in told.items() if nothing] == ["nothing", "a host", "a subtree", "a listener"]
    assert not any(takes_nothing(table(*before), table(*before[:gone], *before[gone + 1 :])) for gone in range(3))


def test_over_a_change_of_policy_only_equal_treatment_keeps_a_connection() -> None:
    """And plain HTTP never."""
    own = "agent:p/a"
    compiled = build(rule("x.com"), rule("y.com"), rule("http://x.com"), rule("y.com/a", scope=own), agents=[own])
    old = HostTable.of(compiled.plan.policies[1])
    new = HostTable.of(compiled.plan.policies[compiled.plan.agents[own]])
    assert may_stay(old, new, "x.com", 443, tls=True)
    assert not may_stay(old, new, "y.com", 443, tls=True)
    assert not may_stay(old, new, "x.com", 80, tls=False)


NAMES = ["x.com", "a.x.com", "b.a.x.com", "q.b.a.x.com", "y.com"]
RULES = st.builds(
    lambda dst, wild, proto, action, tls: rule(
        f"{proto}://{'*.' if wild else ''}{dst}:443", action, tls=tls if proto == "https" else "auto"
    ),
    st.sampled_from(NAMES),
    st.booleans(),
    st.sampled_from(["https", "http", "tcp"]),
    st.sampled_from(["allow", "deny"]),
    st.sampled_from(["auto", "passthrough"]),
)


@settings(deadline=None)
@given(st.lists(RULES, max_size=6))
def test_the_table_finds_what_a_scan_of_all_virtual_hosts_finds(rules: list[Rule]) -> None:
    """The model of the proxy."""
    compiled = compile_plan(rules, (), Topology(), EMPTY, now=0.0)
    if not isinstance(compiled, Compiled):
        return
    hosts, model = HostTable.of(compiled.plan.policies[1]), World(compiled)
    for name in NAMES:
        for tls in (True, False):
            found, scanned = hosts.find(name, 443, tls=tls), model.host(name, 443, tls=tls)
            words = {DeniedHost: "rule_deny", Passthrough: "pass", type(None): "host_not_allowed"}
            assert words.get(type(found), found) == scanned


@settings(deadline=None)
@given(st.lists(RULES, max_size=5), st.lists(RULES, max_size=2))
def test_where_nothing_is_taken_every_connection_may_stay(before: list[Rule], more: list[Rule]) -> None:
    """Whatever rules there are and come: no host that was allowed would lose its connection."""
    first = compile_plan(before, (), Topology(), EMPTY, now=0.0)
    if not isinstance(first, Compiled):
        return
    second = compile_plan([*before, *more], (), Topology(), first.allocations, now=0.0)
    if not isinstance(second, Compiled):
        return
    old, new = (HostTable.of(one.plan.policies[1]) for one in (first, second))
    event(f"nothing taken: {takes_nothing(old, new)}")
    if takes_nothing(old, new):
        for name in NAMES:
            for tls in (True, False):
                was = old.find(name, 443, tls=tls)
                assert was in {None, new.find(name, 443, tls=tls)}
                assert not old.allows(name, 443, tls=tls) or may_stay(old, new, name, 443, tls=tls)
