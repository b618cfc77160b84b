"""The gate's view of a plan (contract 7.8, 8.1; R8, R38)."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.firewall.allocations import EMPTY
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.names import NameTable, NameTables
from clawker_cp.firewall.plan import IDENTITY_BYPASS, IDENTITY_HTTP, NameVerdict, Topology
from clawker_cp.firewall.rules import Rule
from clawker_cp.testing.plan_world import World, build, deny, rule


def decide(name: str, *rules: Rule, names: tuple[str, ...] = (), sans: tuple[str, ...] = ()) -> NameVerdict:
    """Ask policy 1."""
    return NameTables(build(*rules, names=names, sans=sans).plan).decide(1, name)


def test_an_allowed_name_is_answered_under_the_shared_identity() -> None:
    """In any case, with or without a trailing dot."""
    for name in ("api.example.com", "API.Example.COM", "api.example.com."):
        found = decide(name, rule("api.example.com"))
        assert (found.allowed, found.reason, found.identity) == (True, "answered", IDENTITY_HTTP)
        assert (found.rule_id, found.zone, found.concrete, found.san) == (rule("api.example.com").id, "", False, "")


def test_other_names_are_not_allowed() -> None:
    """Parents, children, neighbours, the root."""
    for name in ("example.com", "x.api.example.com", "xapi.example.com", "", ".", "com"):
        assert decide(name, rule("api.example.com")) == NameVerdict(False, "not_allowed")


def test_a_denied_name_says_which_rule() -> None:
    """With its reason."""
    closed = deny("evil.x.com")
    for name in ("evil.x.com", "a.evil.x.com"):
        assert decide(name, rule("*.x.com"), closed) == NameVerdict(False, "rule_deny", closed.id)


def test_a_name_below_an_opaque_wildcard_has_to_be_made_concrete_first() -> None:
    """Then it has an identity of its own."""
    ssh = rule("ssh://*.x.com")
    before = decide("A.x.com.", ssh)
    assert before.allowed and before.concrete and before.zone == "x.com"
    after = decide("A.x.com.", ssh, names=("a.x.com",))
    assert not after.concrete and after.identity >= 256


def test_a_deep_name_below_an_inspected_wildcard_asks_for_a_certificate_name() -> None:
    """The star covers one label only."""
    wild = rule("*.x.com")
    assert decide("x.com", wild).san == ""
    assert decide("a.x.com", wild).san == ""
    assert decide("B.a.x.com", wild).san == "*.a.x.com"
    assert decide("b.a.x.com", wild, sans=("*.a.x.com",)).san == ""


def test_passed_through_and_plain_names_need_no_certificate() -> None:
    """However deep."""
    assert decide("b.a.x.com", rule("*.x.com", tls="passthrough")).san == ""
    assert decide("b.a.x.com", rule("http://*.x.com")).san == ""


def test_a_learning_policy_answers_everything_that_is_not_denied() -> None:
    """Under the identity of a bypass."""
    key = "agent:p/a"
    compiled = build(rule("x.com", scope=key), deny("evil.com", key), learn=[key], agents=[key])
    tables = NameTables(compiled.plan)
    number = compiled.plan.agents[key]
    assert tables.decide(number, "anything.org") == NameVerdict(True, "answered", identity=IDENTITY_BYPASS)
    assert not tables.decide(number, "evil.com").allowed
    assert tables.decide(number, "x.com").identity == IDENTITY_HTTP


def test_an_unknown_policy_allows_nothing() -> None:
    """I1."""
    assert not NameTables(build(rule("x.com")).plan).decide(99, "x.com").allowed


def test_a_policy_that_did_not_change_keeps_its_table() -> None:
    """Building is not free."""
    first = build(rule("x.com"), rule("y.com", scope="project:p"))
    second = build(rule("x.com"), rule("z.com", scope="project:p"), allocations=first.allocations)
    old = NameTables(first.plan)
    new = NameTables(second.plan, old)
    assert new.tables[1] is old.tables[1] and new.tables[2] is not old.tables[2]


NAMES = ["com", "x.com", "a.x.com", "b.a.x.com", "c.b.a.x.com", "y.com"]
RULES = st.builds(
    lambda dst, wild, proto, action: rule(f"{proto}://{'*.' if wild else ''}{dst}:443", action),
    st.sampled_from(NAMES[1:]),
    st.booleans(),
    st.sampled_from(["https", "http", "udp"]),
    st.sampled_from(["allow", "deny"]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(RULES, max_size=6))
def test_the_table_agrees_with_the_classes_of_the_plan(rules: list[Rule]) -> None:
    """The compiled matcher against a walk over the labels."""
    compiled = compile_plan(rules, (), Topology(), EMPTY, now=0.0)
    if not isinstance(compiled, Compiled):
        return
    table, model = NameTable(compiled.plan.policies[1]), World(compiled)
    for name in NAMES:
        found = table.decide(name)
        assert found.allowed == model.resolves(name)
        if found.allowed and not found.concrete:
            assert found.identity == model.identity(name)
