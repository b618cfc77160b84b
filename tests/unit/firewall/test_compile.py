"""The compile as a whole: an oracle for names, determinism, stickiness, limits, policies (contract 7.6, 1.1)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.firewall.allocations import Allocations
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.plan import TCP, Materialised, Plan, Topology
from clawker_cp.firewall.rules import PROTO_ANY, Rule
from clawker_cp.testing.plan_world import World, build, deny, problems, rule, world

NAMES = ["x.com", "a.x.com", "b.x.com", "c.a.x.com", "d.c.a.x.com", "y.com", "com"]
PORTS = [80, 443, 444]
SIDES = {"https": "tls", "wss": "tls", "http": "plain", "ws": "plain", "tcp": "opaque", "ssh": "opaque", "udp": "udp"}

RULES = st.builds(
    lambda dst, wild, proto, port, action, scope: rule(f"{proto}://{'*.' if wild else ''}{dst}:{port}", action, scope),
    st.sampled_from([*NAMES[:4], "y.com"]),
    st.booleans(),
    st.sampled_from(["https", "http", "tcp", "ssh", "udp"]),
    st.sampled_from(PORTS),
    st.sampled_from(["allow", "deny"]),
    st.sampled_from(["global", "agent:p/a"]),
)


def rank(one: Rule, name: str) -> tuple[int, bool] | None:
    """How specific a rule is at a name, by the words of 7.6; None if it does not match."""
    wildcard, base = one.dst.startswith("."), one.dst.removeprefix(".")
    below = name.endswith("." + base)
    matches = name == base or (below and (wildcard or one.is_deny))
    return (base.count(".") + 1 + (not wildcard and name == base), one.is_deny) if matches else None


def allowed(rules: list[Rule], name: str, port: int, proto: str) -> bool:
    """Oracle: the most specific rule of the protocol's class allows, and no other class owns the port."""
    ranked = [(rank(one, name), one) for one in rules if int(one.port) == port]
    matching = [(place, one) for place, one in ranked if place is not None]

    def best(side: str) -> tuple[int, bool]:
        return max((place for place, one in matching if SIDES[one.proto] == side), default=(-1, True))

    mine = best(SIDES[proto])
    if mine[1]:
        return False
    if SIDES[proto] == "udp":
        return True
    if SIDES[proto] == "opaque":
        return all(mine > best(side) for side in ("tls", "plain") if best(side)[0] >= 0)
    if best("opaque")[0] >= 0 and best("opaque") > max(
        best("tls"), best("plain"), key=lambda r: r if r[0] >= 0 else (-1, False)
    ):
        return False
    return best("opaque")[0] < 0 or mine > best("opaque") or not best("opaque")[1]


@settings(max_examples=400, deadline=None)
@given(st.lists(RULES, max_size=7))
def test_the_plan_lets_through_exactly_what_the_rules_allow(rules: list[Rule]) -> None:
    """Kernel rows, name classes and virtual hosts together, for every name, port and protocol."""
    key = "agent:p/a"
    live: dict[str, Materialised] = dict.fromkeys(["global", key], _everything())
    compiled = compile_plan(rules, [key], Topology(), Allocations(), concrete=live, now=0.0)
    if isinstance(compiled, list):
        assert all(problem.field == "port" for problem in compiled)
        return
    for number, policy in compiled.plan.policies.items():
        mine = [one for one in rules if one.scope == "global" or policy.key == key]
        data_plane = World(compiled, number)
        for name in NAMES:
            expected = {
                (p, proto): allowed(mine, name, p, proto) for p in PORTS for proto in ("https", "http", "tcp", "udp")
            }
            found = {(p, proto): data_plane.reaches(name, p, proto) for p, proto in expected}
            assert found == expected, name
            assert data_plane.resolves(name) == any(expected.values())


@settings(max_examples=200, deadline=None)
@given(st.lists(RULES, max_size=7))
def test_no_address_of_another_name_gets_a_request_to_a_forbidden_host_through(rules: list[Rule]) -> None:
    """The proxy alone refuses what the rules deny: an agent may bring any address it likes."""
    compiled = compile_plan(rules, [], Topology(), Allocations(), now=0.0)
    if isinstance(compiled, list):
        return
    data_plane = World(compiled)
    mine = [one for one in rules if one.scope == "global"]
    for name in NAMES:
        for port in PORTS:
            for proto, tls in (("https", True), ("http", False)):
                if data_plane.http(name, port, tls=tls) == "forwarded":
                    places = [(rank(one, name), one) for one in mine if int(one.port) == port]
                    best = max((p for p, one in places if p and SIDES[one.proto] == SIDES[proto]), default=None)
                    opaque = max((p for p, one in places if p and SIDES[one.proto] == "opaque"), default=(-1, False))
                    assert best is not None and not best[1]
                    assert not (opaque[1] and opaque > best)


def _everything() -> Materialised:
    return Materialised(frozenset(NAMES))


@settings(max_examples=50, deadline=None)
@given(st.lists(RULES, max_size=7))
def test_equal_inputs_give_equal_plans(rules: list[Rule]) -> None:
    """The same rules, compiled twice, make the same plan and the same numbers."""
    one, two = (compile_plan(list(rules), ["agent:p/a"], Topology(), Allocations(), now=0.0) for _ in range(2))
    assert one == two


@settings(max_examples=100, deadline=None)
@given(
    st.lists(RULES, max_size=8, unique_by=lambda one: (one.scope, one.key)), RULES, st.randoms(use_true_random=False)
)
def test_a_change_never_renumbers_what_stays(rules: list[Rule], extra: Rule, shuffle: random.Random) -> None:
    """Policies, listeners, identities and rule indices are sticky, in any order of rules."""
    before = compile_plan(rules, [], Topology(), Allocations(), now=0.0)
    shuffled = [one for one in rules if shuffle.random() > 0.3]
    shuffle.shuffle(shuffled)
    if isinstance(before, list):
        return
    after = compile_plan([extra, *shuffled], [], Topology(), before.allocations, now=1.0)
    if isinstance(after, list):
        return
    for table in ("policies", "listeners", "identities", "rules"):
        old, new = getattr(before.allocations, table), getattr(after.allocations, table)
        assert all(new[key] == number for key, number in old.items() if key in new)
        assert len(set(new.values())) == len(new) or table == "listeners"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(RULES, max_size=5, unique_by=lambda one: (one.scope, one.key)), min_size=2, max_size=4))
def test_taking_policies_over_from_the_last_compile_changes_no_result(history: list[list[Rule]]) -> None:
    """Whatever came before."""
    previous: Compiled | None = None
    numbers = Allocations()
    for now, rules in enumerate(history):
        fresh, quick = (
            compile_plan(rules, [], Topology(), numbers, now=float(now), previous=one) for one in (None, previous)
        )
        assert fresh == quick
        if isinstance(quick, Compiled) and isinstance(fresh, Compiled):
            previous, numbers = quick, quick.allocations


def test_policies_that_a_change_does_not_concern_are_the_same_objects() -> None:
    """One agent's rule costs the compile of one policy."""
    rules = [rule("a.com", scope="project:p"), rule("ssh://b.com", scope="project:q")]
    before = compile_plan(rules, [], Topology(), Allocations(), now=0.0)
    assert isinstance(before, Compiled)
    more = [*rules, rule("c.com", scope="project:q")]
    after = compile_plan(more, [], Topology(), before.allocations, now=0.0, previous=before)
    assert isinstance(after, Compiled)
    assert after.parts["project:p"] is before.parts["project:p"]
    assert after.parts["project:q"] is not before.parts["project:q"]
    other = compile_plan(more, [], Topology(http3=False), after.allocations, now=0.0, previous=after)
    assert isinstance(other, Compiled) and other.parts["project:p"] is not before.parts["project:p"]


def test_rows_of_other_rules_do_not_change_when_one_rule_goes() -> None:
    """So that a small change stays a small change in the kernel."""
    rules = [rule(f"ssh://h{number}.com") for number in range(20)]
    before = build(*rules)
    after = build(*rules[1:], allocations=before.allocations)
    assert len(before.plan.routes - after.plan.routes) == 1
    assert after.plan.routes <= before.plan.routes
    assert after.plan.rule_ids[1:] == before.plan.rule_ids[1:] and after.plan.rule_ids[0] == ""


def test_an_agent_has_the_policy_of_its_most_specific_scope_that_has_a_rule() -> None:
    """global is policy 1 (R14)."""
    agents = ["agent:p/a", "agent:p/b", "agent:q/a", "agent:/a"]
    compiled = build(rule("x.com"), rule("y.com", scope="project:p"), rule("z.com", scope="agent:p/a"), agents=agents)
    keys = {agent: compiled.plan.policies[compiled.plan.agents[agent]].key for agent in agents}
    assert keys == {"agent:p/a": "agent:p/a", "agent:p/b": "project:p", "agent:q/a": "global", "agent:/a": "global"}
    assert compiled.plan.policies[1].key == "global"
    mine = World(compiled, compiled.plan.agents["agent:p/a"])
    assert [mine.resolves(name) for name in ("x.com", "y.com", "z.com")] == [True] * 3


def test_a_scope_whose_rules_all_expired_has_no_policy() -> None:
    """Its agents are judged by the wider scope."""
    compiled = build(rule("z.com", scope="agent:p/a", expires_at=5.0), agents=["agent:p/a"])
    assert compiled.plan.agents == {"agent:p/a": 1}


def test_policies_do_not_see_each_others_names() -> None:
    """Two agents with different rules."""
    compiled = build(
        rule("x.com", scope="agent:p/a"), rule("y.com", scope="agent:p/b"), agents=["agent:p/a", "agent:p/b"]
    )
    one, two = (World(compiled, compiled.plan.agents[agent]) for agent in ("agent:p/a", "agent:p/b"))
    assert one.resolves("x.com") and not one.resolves("y.com")
    assert two.resolves("y.com") and not two.resolves("x.com")
    assert one.policy.egress_port == 12000 and two.policy.egress_port == 12001


def test_a_policy_may_go_only_to_proxy_ports_of_its_own() -> None:
    """The packet backstop's allow-list (threats 20)."""
    compiled = build(rule("ssh://x.com", scope="agent:p/a"), rule("ssh://y.com", scope="agent:p/b"))
    ports = {number: {p.port for p in compiled.plan.proxy_ports if p.policy == number} for number in (2, 3)}
    assert ports[2].isdisjoint(ports[3])


def test_a_host_that_can_serve_fewer_policies_says_so() -> None:
    """CAPACITY, limit policies, at the rule that needed one more."""
    rules = [rule("x.com", scope=f"project:p{number}") for number in range(3)]
    (found,) = problems(*rules, topology=Topology(max_policies=3))
    assert (found.index, found.code, found.limit) == (2, "CAPACITY", "policies")
    build(*rules, topology=Topology(max_policies=4))


def test_exhausted_listeners_are_a_capacity_problem() -> None:
    """Eleven full ranges do not fit into 10,997 ports."""
    (found,) = problems(*(rule(f"tcp://h{number}.com:1-1024") for number in range(11)))
    assert (found.code, found.limit) == ("CAPACITY", "listeners")


def test_busy_proxy_ports_are_passed_over() -> None:
    """Free means unallocated and bindable (R4)."""
    compiled = build(rule("ssh://x.com"), topology=Topology(busy=frozenset({(TCP, 10001), (TCP, 10002)})))
    assert compiled.allocations.listeners[TCP, "x.com", 22] == 10003


def test_a_widened_deny_closes_all_of_its_destination() -> None:
    """Every port and protocol, but not what is more specific (contract 7.9)."""
    wide = replace(deny("https://x.com"), proto=PROTO_ANY, port="")
    w = world(rule("https://*.x.com"), rule("ssh://x.com"), rule("https://www.x.com"), rule("http://y.com"), wide)
    assert not w.resolves("x.com") and not w.resolves("a.x.com")
    assert w.http("x.com") == "rule_deny" and w.http("a.x.com") == "rule_deny"
    assert w.http("x.com", 80, tls=False) == "rule_deny"
    assert w.reaches("www.x.com", 443, "https")
    closed = world(rule("tcp://203.0.113.0/24:1-9"), replace(deny("tcp://203.0.113.7:1"), proto=PROTO_ANY, port=""))
    assert [closed.address("203.0.113.7", port) for port in (1, 9, 443)] == ["deny"] * 3
    assert closed.address("203.0.113.8", 9) == "pass"


def test_an_empty_set_of_rules_is_a_plan_that_allows_nothing() -> None:
    """Policy 1 exists, without rows."""
    plan: Plan = build(agents=["agent:p/a"]).plan
    assert plan.agents == {"agent:p/a": 1}
    assert (plan.routes, plan.cidrs) == (frozenset(), {})


@pytest.mark.parametrize("count", [1000])
def test_a_thousand_rules_compile(count: int) -> None:
    """Into one virtual host each and no rows of their own."""
    plan = build(*(rule(f"https://h{number}.com") for number in range(count))).plan
    assert len(plan.policies[1].origins) == count
    assert len(plan.routes) == 4
