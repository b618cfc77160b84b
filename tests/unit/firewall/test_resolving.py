"""Tests of what the gate is told while plans come and go."""

from __future__ import annotations

from clawker_cp.firewall.resolving import PolicyNames
from clawker_cp.testing.plan_world import build, rule


def test_nothing_resolves_before_the_first_plan() -> None:
    """I1: no plan, no answer, for agents and for the proxy."""
    names = PolicyNames()

    assert not names.decide(1, "a.example.com").allowed
    assert names.for_proxy("a.example.com") is None


def test_an_announced_plan_answers_the_proxy_only() -> None:
    """The proxy may resolve a new cluster's name before agents may."""
    names = PolicyNames()
    tables = names.tables_for(build(rule("tcp://a.example.com:22")).plan)
    names.announce(tables)

    assert names.for_proxy("a.example.com") is not None
    assert not names.decide(1, "a.example.com").allowed
    names.announce(None)
    assert names.for_proxy("a.example.com") is None
    names.publish(tables)
    assert names.decide(1, "a.example.com").allowed
    assert names.for_proxy("A.example.com.") is not None


def test_concrete_names_go_idle_when_nobody_asks() -> None:
    """Asking keeps a name alive; an hour without makes it idle."""
    now = [0.0]
    names = PolicyNames(clock=lambda: now[0])
    compiled = build(rule("tcp://*.example.com:22"), names=["a.example.com", "b.example.com"])
    names.publish(names.tables_for(compiled.plan))
    now[0] = 3000
    names.decide(1, "a.example.com")
    now[0] = 4000

    assert names.idle(3600) == {1: {"b.example.com"}}


def test_the_proxy_gets_private_addresses_only_if_everybody_wants_them() -> None:
    """One policy's allow_private never lets another policy's agents reach inside through the proxy."""
    names = PolicyNames()
    learning = build(
        rule("https://intra.example.com", scope="agent:p/a", allow_private=True),
        agents=["agent:p/l"],
        learn=["agent:p/l"],
    )
    names.publish(names.tables_for(learning.plan))
    alone = PolicyNames()
    alone.publish(alone.tables_for(build(rule("https://intra.example.com", allow_private=True)).plan))

    verdict, other = names.for_proxy("intra.example.com"), alone.for_proxy("intra.example.com")
    assert verdict is not None
    assert not verdict.allow_private
    assert other is not None
    assert other.allow_private
