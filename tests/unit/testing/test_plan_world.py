"""The model of the data plane that policy tests ask."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clawker_cp.testing.plan_world import World, build, problems, rule, world


def test_two_virtual_hosts_with_one_domain_are_an_error_of_the_plan() -> None:
    """The real proxy would refuse the configuration."""
    compiled = build(rule("x.com"))
    policy = compiled.plan.policies[1]
    doubled = replace(policy, origins=policy.origins * 2)
    broken = World(replace(compiled, plan=replace(compiled.plan, policies={1: doubled})))
    with pytest.raises(AssertionError, match="one domain"):
        broken.http("x.com")


def test_a_route_to_a_proxy_port_that_is_not_admitted_is_an_error_of_the_plan() -> None:
    """The packet backstop would drop it."""
    compiled = build(rule("ssh://x.com"))
    broken = World(replace(compiled, plan=replace(compiled.plan, proxy_ports=frozenset())))
    with pytest.raises(AssertionError):
        broken.listener("x.com", 22)


def test_it_expects_what_it_is_asked_for() -> None:
    """A plan, or problems."""
    assert world(rule("x.com")).reaches("x.com", 443, "https")
    with pytest.raises(AssertionError):
        build(rule("x.com"), rule("tcp://x.com:443"))
    with pytest.raises(AssertionError):
        problems(rule("x.com"))
