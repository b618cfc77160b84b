"""
What the services ask of the rules: add, remove, list, judge (contract 2.4, 6.1, 7.5).

Turns requests into changes of the stored set and hands them to the reconciler, which is the only
one who applies them. A caller waits at most `limit_s`; the change goes on and the error says
whether it is saved already.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import structlog

from clawker_cp.errors import ClawkerError, InvalidInput, Unavailable
from clawker_cp.firewall import merge
from clawker_cp.firewall.changes import Applied, Progress, refusal
from clawker_cp.firewall.check import Checker, Request, Verdict
from clawker_cp.firewall.effective import EffectiveRule, is_live, listing
from clawker_cp.firewall.merge import AddStatus, Removed, RemoveStatus
from clawker_cp.firewall.plan import Topology
from clawker_cp.firewall.rules import GLOBAL, Problem, Rule, RuleInvalid, scope_order, scopes_of, valid_scope
from clawker_cp.firewall.validate import validate

log = structlog.get_logger()
T = TypeVar("T")


class PolicyOwner(Protocol):
    """The reconciler, as far as rules are concerned."""

    @property
    def rules(self) -> tuple[Rule, ...]: ...
    @property
    def topology(self) -> Topology: ...
    @property
    def readable(self) -> bool: ...

    version: int

    def policy_of(self, key: str, /) -> int: ...
    async def change_stored(
        self, change: Callable[[Sequence[Rule]], Sequence[Rule]], progress: Progress | None = None
    ) -> Applied: ...
    async def judge_stored(self, change: Callable[[Sequence[Rule]], Sequence[Rule]]) -> list[Problem]: ...
    async def start_over(self) -> Applied: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rule of a request; `problem` only in a dry run."""

    rule_id: str
    status: AddStatus | None
    problem: str = ""


class RuleBook:
    """
    The rules as services see them. `hits` gives the time (Unix seconds, 0 = never) a rule last decided.
    """

    def __init__(
        self,
        policy: PolicyOwner,
        *,
        hits: Callable[[], Mapping[str, int]] = dict,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._policy = policy
        self._hits = hits
        self._wall = wall

    # -- changing ----------------------------------------------------------------------------

    async def put(self, rules: Sequence[Rule], *, source: str, limit_s: float) -> tuple[list[Outcome], Applied]:
        """
        Add rules, each in its scope; all or nothing. Outcomes are in the order of `rules`.

        Raises `RuleInvalid` with every problem, indexed by the position in `rules`; `CapacityExceeded` if only bounds
        are exceeded.
        """
        self._refuse_expired(rules)
        validation = validate(rules)
        if validation.problems:
            raise refusal(list(validation.problems))
        outcomes: list[Outcome] = []

        def change(stored: Sequence[Rule]) -> Sequence[Rule]:
            outcomes[:] = []
            new, found = self._added(stored, validation.rules, source)
            outcomes.extend(found)
            return new

        try:
            applied = await self._within(limit_s, lambda progress: self._policy.change_stored(change, progress))
        except RuleInvalid as refused:
            raise RuleInvalid(_as_asked(refused.problems, validation.rules)) from refused
        return outcomes, applied

    async def judge(self, rules: Sequence[Rule], *, limit_s: float) -> list[Outcome]:
        """
        Say what `put` would do with each rule, and what is wrong with it; nothing is written.
        """
        problems: dict[int, list[str]] = {}
        for problem in validate(rules).problems:
            problems.setdefault(problem.index, []).append(f"{problem.field} {problem.text}")
        good = [index for index in range(len(rules)) if index not in problems]
        normal = validate([rules[index] for index in good]).rules
        outcomes: list[Outcome] = []

        def change(stored: Sequence[Rule]) -> Sequence[Rule]:
            new, found = self._added(stored, normal, "control")
            outcomes[:] = found
            return new

        found = await self._within(limit_s, lambda _: self._policy.judge_stored(change))
        for problem in _as_asked(found, normal):
            targets = [good[problem.index]] if 0 <= problem.index < len(good) else good
            for index in targets:
                problems.setdefault(index, []).append(f"{problem.field} {problem.text}")
        judged = dict(zip(good, outcomes, strict=False))
        return [
            Outcome(judged[index].rule_id if index in judged else "", None, "; ".join(problems[index]))
            if index in problems
            else judged[index]
            for index in range(len(rules))
        ]

    async def remove(
        self, dst: str, proto: str, port: str, path: str, *, limit_s: float
    ) -> tuple[RemoveStatus, Applied | None]:
        """
        Remove a global permanent rule, or one path entry of it; a miss changes nothing.
        """
        if not dst:
            raise InvalidInput("dst: is empty; name the rule's destination, or set all")
        return await self._remove(lambda stored: merge.remove(stored, dst, proto, port, path), limit_s)

    async def remove_all(self, *, limit_s: float) -> tuple[RemoveStatus, Applied | None]:
        """
        Remove every global permanent rule; also the repair of files that cannot be read (7.9).
        """
        if not self._policy.readable:
            applied = await self._within(limit_s, lambda _: self._policy.start_over())
            log.warning("firewall_rules_wiped", cause="the rules files were not readable")
            return RemoveStatus.REMOVED, applied
        status, applied_or_none = await self._remove(merge.remove_all, limit_s)
        if status is RemoveStatus.REMOVED:
            log.warning("firewall_rules_wiped", cause="asked for")
        return status, applied_or_none

    async def delete(
        self, ids: Sequence[str], scope: str, *, dry_run: bool, limit_s: float
    ) -> tuple[tuple[Rule, ...], tuple[str, ...], Applied | None]:
        """
        Remove rules by id, or all of a scope: what went, and the ids that no rule has.

        Raises `InvalidInput` unless exactly one of both is given.
        """
        if bool(ids) == bool(scope):
            raise InvalidInput("ids, scope: give one of both")
        if scope and not valid_scope(scope):
            raise InvalidInput(f"scope: {scope!r} is not global, project:<p> or agent:<p>/<a>")
        missing: tuple[str, ...] = ()

        def change(stored: Sequence[Rule]) -> Removed:
            nonlocal missing
            if scope:
                return merge.remove_scope(stored, scope)
            removed, missing = merge.remove_ids(stored, ids)
            return removed

        if dry_run:
            gone: tuple[Rule, ...] = ()

            def look(stored: Sequence[Rule]) -> Sequence[Rule]:
                nonlocal gone
                gone = change(stored).removed
                return stored

            await self._within(limit_s, lambda _: self._policy.judge_stored(look))
            return gone, missing, None
        removed: list[Rule] = []
        _, applied = await self._remove(change, limit_s, removed)
        return tuple(removed), missing, applied

    # -- looking -----------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of the policy in force."""
        return self._policy.version

    def stored(self) -> list[Rule]:
        """
        The global permanent rules in stored order, as `FirewallListRules` shows them.
        """
        return [rule for rule in self._policy.rules if rule.scope == GLOBAL and not rule.expires_at]

    def in_scope(self, scope: str = "") -> list[tuple[Rule, int]]:
        """
        Rules of a scope or of all, with the time each last decided: global, projects, agents; then stored order.
        """
        if scope and not valid_scope(scope):
            raise InvalidInput(f"scope: {scope!r} is not global, project:<p> or agent:<p>/<a>")
        hits = self._hits()
        listed = [rule for rule in self._policy.rules if not scope or rule.scope == scope]
        return [(rule, hits.get(rule.id, 0)) for rule in sorted(listed, key=lambda rule: scope_order(rule.scope))]

    def effective(self, key: str) -> list[EffectiveRule]:
        """
        The rules that hold for an agent (scope key), most specific first.
        """
        return listing(self._holding(key), tls_minimal=self._policy.topology.tls_minimal)

    def policy_of(self, key: str) -> int:
        """The policy number of an agent."""
        return self._policy.policy_of(key)

    def check(self, key: str, request: Request) -> Verdict:
        """
        Judge a request of an agent (scope key, `global` = the global rules alone) without trying it.
        """
        rules = self._holding(key)
        now = self._wall()
        others = [rule for rule in self._policy.rules if rule not in rules]
        topology = self._policy.topology
        checker = Checker(
            rules,
            agent=key.removeprefix("agent:") if key != GLOBAL else "/",
            others=others,
            expired=frozenset(rule.id for rule in others if not is_live(rule, now)),
            reserved=topology.reserved,
            http3=topology.http3,
            tls_minimal=topology.tls_minimal,
        )
        return checker.check(request)

    # -- inner -------------------------------------------------------------------------------

    def _holding(self, key: str) -> list[Rule]:
        scopes = (GLOBAL,) if key == GLOBAL else scopes_of(key)
        now = self._wall()
        return [rule for rule in self._policy.rules if rule.scope in scopes and is_live(rule, now)]

    def _added(
        self, stored: Sequence[Rule], incoming: Sequence[Rule], source: str
    ) -> tuple[tuple[Rule, ...], list[Outcome]]:
        added = merge.add(stored, incoming)
        # Who brought a rule is said of new ones only: adding it again must be no change.
        now = int(self._wall())
        known = {(rule.scope, rule.key, bool(rule.expires_at)) for rule in stored}
        rules = tuple(
            rule
            if (rule.scope, rule.key, bool(rule.expires_at)) in known
            else replace(rule, source=rule.source or source, created_at=rule.created_at or now)
            for rule in added.rules
        )
        return rules, [Outcome(rule.id, status) for status, rule in added.outcomes]

    def _refuse_expired(self, rules: Sequence[Rule]) -> None:
        now = self._wall()
        late = [
            Problem(index, rule.dst, "expires_at", "is over already")
            for index, rule in enumerate(rules)
            if rule.expires_at and rule.expires_at <= now
        ]
        if late:
            raise RuleInvalid(late)

    async def _remove(
        self, take: Callable[[Sequence[Rule]], Removed], limit_s: float, gone: list[Rule] | None = None
    ) -> tuple[RemoveStatus, Applied | None]:
        found = Removed((), (), RemoveStatus.NOT_FOUND)

        def change(stored: Sequence[Rule]) -> Sequence[Rule]:
            nonlocal found
            found = take(stored)
            return found.rules

        applied = await self._within(limit_s, lambda progress: self._policy.change_stored(change, progress))
        if gone is not None:
            gone.extend(found.removed)
        return found.status, applied if found.status is not RemoveStatus.NOT_FOUND else None

    async def _within(self, limit_s: float, work: Callable[[Progress], Awaitable[T]]) -> T:
        progress = Progress()
        try:
            async with asyncio.timeout(limit_s):
                return await work(progress)
        except TimeoutError as error:
            raise too_slow(progress, limit_s) from error


def too_slow(progress: Progress, limit_s: float) -> ClawkerError:
    """
    The error of a change that goes on after its caller's time is over.
    """
    said = "it is saved and still being applied" if progress.saved else "it is not saved yet and goes on"
    return Unavailable(
        f"the change took longer than {limit_s:.1f} s: {said}",
        code="STACK_UNHEALTHY",
        hint="look at `clawkerctl status`",
        details={"saved": "true" if progress.saved else "false"},
    )


def _as_asked(problems: Sequence[Problem], incoming: Sequence[Rule]) -> list[Problem]:
    """Turn positions in the whole set into positions in the request, as far as the rule came from there."""
    known: dict[str, int] = {}
    for index, rule in enumerate(incoming):
        known.setdefault(rule.dst, index)
    return [replace(problem, index=known.get(problem.dst, -1)) for problem in problems]
