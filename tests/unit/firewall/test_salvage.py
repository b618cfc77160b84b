"""Serving a faulty set as far as it holds, closing rather than opening (contract 7.9)."""

from __future__ import annotations

from collections.abc import Sequence

from clawker_cp.firewall.allocations import EMPTY
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.documents import read_item
from clawker_cp.firewall.plan import Topology
from clawker_cp.firewall.rules import PROTO_ANY, Problem, Rule
from clawker_cp.firewall.salvage import Salvaged, close, drop_until_it_compiles, salvage, widen
from clawker_cp.testing.plan_world import World, build, deny, rule


def read(*items: object) -> Salvaged:
    """Salvage document items."""
    return salvage([read_item(item, strict=False) for item in items])


def test_a_faulty_allow_is_left_out() -> None:
    """The rest holds."""
    found = read({"dst": "a.com"}, {"dst": "b.com", "port": "0"}, {"dst": "c.com", "port": [1]}, 5)
    assert [one.dst for one in found.rules] == ["a.com"]
    assert (found.faulty, found.closing, found.close_wildcards) == (frozenset({1, 2, 3}), (), False)


def test_a_faulty_deny_is_widened_to_all_of_its_destination() -> None:
    """In its scope, or for everybody if that is unusable."""
    found = read(
        {"dst": ".b.com", "port": "0", "action": "DENY", "scope": "project:p"},
        {"dst": "c.com", "proto": "x", "action": "deny", "scope": "?"},
    )
    assert [(one.dst, one.proto, one.scope) for one in found.closing] == [
        (".b.com", PROTO_ANY, "project:p"),
        ("c.com", PROTO_ANY, "global"),
    ]


def test_a_deny_of_an_unusable_destination_takes_every_wildcard_allow() -> None:
    """Names and networks; exact allows stay."""
    found = read({"dst": "b..com", "action": "deny"})
    assert found.close_wildcards
    rules = [rule("*.x.com"), rule("x.com"), rule("10.0.0.0/8"), rule("10.0.0.1"), deny("*.y.com")]
    assert [one.dst for one in close(rules, found.closing, found.close_wildcards)] == ["x.com", "10.0.0.1", ".y.com"]


def test_a_second_rule_of_the_same_key_and_action_is_dropped() -> None:
    """Different actions both count, and deny wins."""
    found = read(
        {"dst": "a.com"},
        {"dst": "a.com", "port": 443},
        {"dst": "a.com", "action": "deny"},
        {"dst": "a.com", "action": "deny"},
    )
    assert [one.action for one in found.rules] == ["allow", "deny"]
    assert (found.faulty, found.closing) == (frozenset({1, 3}), ())
    assert not World(build(*found.rules)).resolves("a.com")


def compiled(rules: Sequence[Rule]) -> Compiled | list[Problem]:
    """Compile with defaults."""
    return compile_plan(rules, (), Topology(), EMPTY, now=0.0)


def test_rules_that_do_not_compile_together_are_left_out_until_they_do() -> None:
    """The later one of a conflict."""
    found, skipped = drop_until_it_compiles([rule("tcp://x.com:443"), rule("x.com"), rule("y.com")], compiled)
    assert [problem.dst for problem in skipped] == ["x.com"]
    data_plane = World(found)
    assert data_plane.resolves("y.com") and data_plane.listener("x.com", 443) == "x.com:443"


def test_salvaging_ends_even_if_every_rule_is_a_problem() -> None:
    """With nothing left."""

    def refuse(rules: Sequence[Rule]) -> list[Problem] | int:
        return [Problem(0, one.dst, "x", "y") for one in rules[:1]] or 7

    assert drop_until_it_compiles([rule("a.com"), deny("b.com"), rule("c.com")], refuse)[0] == 7


def test_a_denial_is_never_left_out_while_there_is_an_allow() -> None:
    """A compile that blames the deny gets a wider one, then fewer allows."""
    seen: list[list[tuple[str, str]]] = []

    def refuse(rules: Sequence[Rule]) -> list[Problem] | int:
        seen.append([(one.dst, one.proto) for one in rules])
        return [Problem(len(rules) - 1, "", "x", "y")] if len(rules) > 1 else 7

    drop_until_it_compiles([rule("a.com"), rule("b.com"), deny("c.com")], refuse)
    assert seen[1] == [("a.com", "https"), ("b.com", "https"), ("c.com", PROTO_ANY)]
    assert all(("c.com", PROTO_ANY) in one for one in seen[1:])


def test_a_destination_that_is_none_cannot_be_widened() -> None:
    """The caller closes wildcards instead."""
    assert widen("a..b", "global") is None
