"""
Making the best of rules that are readable but do not hold (contract 7.9).

An allow that does not hold is left out. A deny that does not hold is widened to its whole
destination, every port and protocol; if not even its destination is usable, every wildcard
allow goes. Closing too much beats opening anything (I1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from clawker_cp.firewall.destinations import DestinationError, Kind, parse_destination
from clawker_cp.firewall.documents import Reading
from clawker_cp.firewall.rules import DENY, PROTO_ANY, Problem, Rule, normalise, valid_scope
from clawker_cp.firewall.validate import rule_problems

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What is left of one file; `faulty` are the positions of items that do not hold."""

    rules: tuple[Rule, ...] = ()
    problems: tuple[Problem, ...] = ()
    closing: tuple[Rule, ...] = ()
    close_wildcards: bool = False
    faulty: frozenset[int] = frozenset()


def salvage(readings: Sequence[Reading]) -> Salvaged:
    """Sort a file's items into rules that hold, denials that stand in, and problems."""
    rules: dict[tuple[str, str, str, bool], Rule] = {}
    problems: list[Problem] = []
    closing: list[Rule] = []
    faulty: set[int] = set()
    close_wildcards = False
    for index, reading in enumerate(readings):
        found = list(reading.problems)
        if reading.rule is not None:
            found += rule_problems(reading.rule)
            rule = normalise(reading.rule)
            place = (rule.scope, rule.key, rule.action, bool(rule.expires_at))
            if not found and place not in rules:
                rules[place] = rule
                continue
            if not found:
                found = [("rule", "says the same as an earlier one and is left out")]
        problems += (Problem(index, reading.dst, field, text) for field, text in found)
        faulty.add(index)
        if reading.denies and reading.rule is not None and not rule_problems(reading.rule):
            continue  # a duplicate: the earlier one denies
        if reading.denies:
            stand_in = widen(reading.dst, reading.rule.scope if reading.rule else "global")
            closing += [stand_in] if stand_in else []
            close_wildcards |= stand_in is None
    return Salvaged(tuple(rules.values()), tuple(problems), tuple(closing), close_wildcards, frozenset(faulty))


def widen(dst: str, scope: str) -> Rule | None:
    """Return a denial of everything at `dst` (for everybody if the scope is unusable), None if `dst` is."""
    try:
        parse_destination(dst.strip())
    except DestinationError:
        return None
    rule = normalise(Rule(dst.strip(), action=DENY, scope=scope if valid_scope(scope) else "global"))
    return replace(rule, proto=PROTO_ANY, port="")


def close(rules: Sequence[Rule], closing: Sequence[Rule], close_wildcards: bool) -> tuple[Rule, ...]:
    """Return the set to compile: without wildcard allows if they must go, with the stand-in denials."""
    kept = [rule for rule in rules if not (close_wildcards and _opens_widely(rule))]
    return (*kept, *closing)


def _opens_widely(rule: Rule) -> bool:
    destination = parse_destination(rule.dst)
    return not rule.is_deny and (destination.wildcard or destination.kind is Kind.CIDR)


def drop_until_it_compiles(
    rules: Sequence[Rule], compile_rules: Callable[[Sequence[Rule]], Result | list[Problem]]
) -> tuple[Result, tuple[Problem, ...]]:
    """
    Compile, leaving out (or widening) the rules that problems name until it succeeds.

    For start-up only: a set that was stored is served as far as it holds. At run time a set that
    does not compile is refused whole. No denial is ever left out while an allow is there. Ends,
    since every round takes an allow or widens a deny.
    """
    left = list(rules)
    skipped: list[Problem] = []
    while True:
        result = compile_rules(left)
        if not isinstance(result, list):
            return result, tuple(skipped)
        skipped += result
        guilty = {problem.index for problem in result}
        kept = [_lessened(rule) if index in guilty else rule for index, rule in enumerate(left)]
        if kept == left:  # no single rule is to blame, or only denials are: allow less
            allows = [index for index, rule in enumerate(left) if not rule.is_deny]
            kept = [rule for index, rule in enumerate(left) if index != allows[-1]] if allows else []
        left = [rule for rule in kept if rule is not None]


def _lessened(rule: Rule) -> Rule | None:
    """Return what stays of a rule that does not compile: nothing of an allow, all of its dst for a deny."""
    return replace(rule, proto=PROTO_ANY, port="") if rule.is_deny else None
