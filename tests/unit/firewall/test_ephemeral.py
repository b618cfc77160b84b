"""Rules that live as long as a run (R26)."""

from __future__ import annotations

from clawker_cp.firewall.ephemeral import EphemeralRules
from clawker_cp.testing.plan_world import rule


def test_a_proposal_is_not_there_until_it_is_committed() -> None:
    """A change that does not compile or that Envoy refuses leaves nothing behind."""
    layer = EphemeralRules()
    rules = (rule("x.com", scope="agent:p/a"),)
    layer.commit(rules)
    left = layer.removing("agent:p/a").rules
    assert (layer.rules, left) == (rules, ())
    layer.commit(left)
    assert layer.rules == ()


def test_the_rules_of_one_run_go_together() -> None:
    """Those of others stay."""
    layer = EphemeralRules()
    layer.commit([rule("x.com", scope="agent:p/a"), rule("y.com", scope="agent:p/b")])
    removed = layer.removing("agent:p/a")
    layer.commit(removed.rules)
    assert [one.dst for one in layer.rules] == ["y.com"]
    assert [one.dst for one in removed.removed] == ["x.com"]
