"""Tests of what a change is taken for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clawker_cp.errors import CapacityExceeded, ClawkerError, Unavailable
from clawker_cp.firewall.changes import (
    Wanted,
    agents_touched,
    lost_destinations,
    moved_agents,
    only_closes,
    read_ephemeral,
    refusal,
    stored_not_live,
)
from clawker_cp.firewall.plan import Materialised
from clawker_cp.firewall.rules import Problem, Rule, RuleInvalid
from clawker_cp.testing.plan_world import build, deny, rule

AGENT = "agent:p/a"
A, B = rule("https://a.example.com"), rule("tcp://b.example.com:22")


def _closes(before: tuple[Rule, ...], after: tuple[Rule, ...]) -> bool:
    old = build(*before)
    new = build(*after, allocations=old.allocations)
    return only_closes(Wanted(stored=before), Wanted(stored=after), old.plan, new.plan)


@pytest.mark.parametrize(
    ("before", "after", "closes"),
    [
        ((A, B), (A,), True),
        ((A,), (A, deny("https://x.example.com")), True),
        ((A, B), (A, deny("tcp://b.example.com:22")), True),
        ((A,), (A, B), False),
        ((A, deny("https://x.example.com")), (A,), False),
        ((A,), (B,), False),
        ((rule("https://a.example.com/x"),), (A,), False),
        ((A,), (A, deny("https://a.example.com", scope=AGENT)), False),
    ],
)
def test_only_what_takes_away_is_a_closing(before: tuple[Rule, ...], after: tuple[Rule, ...], closes: bool) -> None:
    """Allows gone and denials added close; anything that may open, or needs a new listener, does not."""
    assert _closes(before, after) is closes


def test_new_live_names_open_retired_ones_close() -> None:
    """A concrete name needs its listener before its answer; without it only something goes."""
    wild = rule("tcp://*.example.com:22")
    old, new = build(wild), build(wild, names=["x.example.com"])
    empty = Wanted(stored=(wild,))
    full = replace(empty, concrete={"global": Materialised(frozenset({"x.example.com"}))})

    assert not only_closes(empty, full, old.plan, new.plan)
    assert only_closes(full, empty, new.plan, old.plan)


def test_moves_losses_and_touched_agents_are_found() -> None:
    """An agent with new rules moves; a removed destination is lost for its policy."""
    old = build(A, B, agents=[AGENT])
    new = build(A, rule("https://c.example.com", scope=AGENT), agents=[AGENT], allocations=old.allocations)

    assert moved_agents(old.plan, new.plan) == {AGENT: (1, 2)}
    assert [(number, lost.dst) for number, lost in lost_destinations(old.plan, new.plan)] == [(1, "b.example.com")]
    assert agents_touched(old.plan, new.plan) == 1
    assert agents_touched(old.plan, old.plan) == 0


def test_ephemeral_rules_belong_to_their_agent() -> None:
    """Text, mappings and rules alike; every problem is reported at once."""
    made = read_ephemeral([{"dst": "a.example.com", "scope": "global"}, A], AGENT)

    assert [(one.dst, one.scope) for one in made] == [("a.example.com", AGENT)] * 2
    assert read_ephemeral("rules:\n- dst: a.example.com\n", AGENT)[0].scope == AGENT
    with pytest.raises(RuleInvalid) as failure:
        read_ephemeral([{"dst": "a..b"}, {"dst": "x.example.com", "proto": "gopher"}], AGENT)
    assert {problem.index for problem in failure.value.problems} == {0, 1}


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Unavailable("silence"), "STACK_UNHEALTHY"),
        (Unavailable("silence", code="STACK_PROBE"), "STACK_UNHEALTHY"),
        (Unavailable("disk full", code="CONFIG_REGEN"), "CONFIG_REGEN"),
        (ClawkerError("map full", code="ROUTE_SYNC"), "ROUTE_SYNC"),
        (OSError("map full"), "ROUTE_SYNC"),
    ],
)
def test_what_is_stored_and_not_in_force_names_the_part_that_failed(failure: Exception, code: str) -> None:
    """Files, maps or the proxy; and always that the change is kept."""
    error = stored_not_live(failure)
    assert (error.code, error.details) == (code, {"saved": "true"}) and str(failure) in error.message


def test_a_full_band_is_capacity_a_bad_rule_is_not() -> None:
    """The category says what the caller can do about it."""
    full = Problem(0, "a", "port", "is too much", "CAPACITY", "listeners")
    bad = Problem(1, "b", "dst", "is wrong")

    assert isinstance(refusal([full]), CapacityExceeded)
    assert isinstance(refusal([full, bad]), RuleInvalid)
