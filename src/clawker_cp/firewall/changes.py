"""
What a change is: what is wanted, what it takes away, which order it needs, whom it goes to. Pure.

`data_plane.py` acts on it; the application reads `Change` to cut connections.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import structlog

from clawker_cp.errors import CapacityExceeded, ClawkerError, Unavailable
from clawker_cp.firewall.documents import read_item, read_rules
from clawker_cp.firewall.plan import CidrRow, Materialised, OpaqueTarget, Plan, ProxyPort, RouteRow
from clawker_cp.firewall.rules import Problem, Rule, RuleInvalid
from clawker_cp.firewall.salvage import close
from clawker_cp.firewall.validate import validate

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Change:
    """
    What one application took away.

    `moved`: agent -> (old, new) policy number. `lost`: unread destinations by policy number that
    have no listener there any more. For HTTP hosts ask `hosts.may_stay` with the policies' tables.
    """

    old: Plan
    new: Plan
    moved: Mapping[str, tuple[int, int]]
    lost: tuple[tuple[int, OpaqueTarget], ...]

    @property
    def policies(self) -> tuple[int, ...]:
        """Numbers of policies that differ in anything."""
        numbers = {*self.old.policies, *self.new.policies}
        return tuple(sorted(n for n in numbers if self.old.policies.get(n) != self.new.policies.get(n)))


@dataclass(frozen=True, slots=True)
class Applied:
    """Contract 2.4: `version` counts effective changes; `live` = acknowledged by the data plane."""

    version: int
    live: bool
    apply_us: int = 0
    agents: int = 0
    connections_cut: int = 0
    problems: tuple[Problem, ...] = ()


@dataclass(slots=True)
class Progress:
    """How far a change came, for a caller that could not wait for its end."""

    saved: bool = False


class EnvoyTarget(Protocol):
    """The proxy: `envoy.stack.EnvoyStack`."""

    @property
    def running(self) -> bool: ...
    async def start(self, plan: Plan) -> None: ...
    async def open(self, plan: Plan) -> int: ...
    async def close(self) -> int: ...
    async def validate(self, plan: Plan) -> None: ...
    async def stage(self, plan: Plan) -> None: ...
    async def has_ended(self) -> bool: ...
    async def busy(self, destinations: Collection[str]) -> set[str]: ...


class KernelTarget(Protocol):
    """The kernel maps: `ebpf.Manager`; called in a thread."""

    def sync_routes(
        self, route_rows: Iterable[RouteRow], cidr_rows: Iterable[CidrRow], ports: Iterable[ProxyPort], /
    ) -> object: ...


class AgentsTarget(Protocol):
    """Running agents, of the application."""

    async def set_policies(self, policies: Mapping[str, int], /) -> None:
        """Move agents (scope keys) to other policy numbers, in the kernel."""
        ...

    async def admit(self, plan: Plan, /) -> None:
        """Let through on the host what a plan passes directly, and nothing it does not."""
        ...

    async def cut(self, change: Change, /) -> int:
        """Destroy connections that the change forbids (6.1, R13); returns how many."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    Everything a compile depends on that changes at run time.

    `unknown`: the stored rules cannot be read, so nobody's rules may open anything (R21). `former`: policy keys
    that living agents had before their present one, by agent: sockets that exist keep those ports (contract 7.6).
    """

    stored: tuple[Rule, ...] = ()
    closing: tuple[Rule, ...] = ()
    close_wildcards: bool = False
    ephemeral: tuple[Rule, ...] = ()
    agents: frozenset[str] = frozenset()
    learn: frozenset[str] = frozenset()
    concrete: Mapping[str, Materialised] = field(default_factory=lambda: MappingProxyType({}))
    unknown: bool = False
    former: frozenset[tuple[str, str]] = frozenset()

    @property
    def learning(self) -> frozenset[str]:
        return frozenset() if self.unknown else self.learn

    @property
    def rules(self) -> tuple[Rule, ...]:
        if self.unknown:
            return ()
        return (*close(self.stored, self.closing, self.close_wildcards), *self.ephemeral)


def outlived(wanted: Wanted, old: Plan, new: Plan) -> Wanted:
    """
    The same with the policy keys that agents leave by a change, and without those of agents that are gone.
    """
    left = {
        (agent, old.policies[before].key)
        for agent, (before, _after) in moved_agents(old, new).items()
        if before in old.policies
    }
    former = frozenset(one for one in wanted.former | left if one[0] in wanted.agents)
    return replace(wanted, former=former)


def read_ephemeral(rules: str | Sequence[Rule | Mapping[str, Any]], scope: str) -> list[Rule]:
    """Read items, put them into a scope, validate; raises `RuleInvalid` with every problem."""
    if isinstance(rules, str):
        rules = read_rules(rules, scope=scope)
    problems: list[Problem] = []
    made: list[Rule] = []
    for index, item in enumerate(rules):
        if isinstance(item, Rule):
            made.append(replace(item, scope=scope))
            continue
        reading = read_item(item, strict=True, scope=scope)
        problems += (Problem(index, reading.dst, field, text) for field, text in reading.problems)
        if reading.rule is not None:
            made.append(replace(reading.rule, scope=scope))
    if problems:
        raise RuleInvalid(problems)
    validation = validate(made)
    if validation.problems:
        raise RuleInvalid(validation.problems)
    return list(validation.rules)


def refusal(problems: list[Problem]) -> ClawkerError:
    if all(problem.code == "CAPACITY" for problem in problems):
        return CapacityExceeded("; ".join(str(problem) for problem in problems), limit=problems[0].limit)
    return RuleInvalid(problems)


def stored_not_live(failure: BaseException) -> ClawkerError:
    """
    The error of a change that cannot be taken back any more and is not enforced yet.

    A configuration that could not be written and maps that could not are told as such; the rest is the proxy's.
    """
    code = failure.code if isinstance(failure, ClawkerError) else "ROUTE_SYNC"
    if code not in {"ROUTE_SYNC", "CONFIG_REGEN"}:
        code = "STACK_UNHEALTHY"
    return Unavailable(
        f"the change is accepted and stored but not in force yet: {failure}",
        code=code,
        hint="it is tried again",
        details={"saved": "true"},
    )


def only_closes(before: Wanted, after: Wanted, old: Plan, new: Plan) -> bool:
    """Whether a change can only take away: allows gone, denials added, names retired."""
    added = set(after.rules) - set(before.rules)
    removed = set(before.rules) - set(after.rules)
    if any(not rule.is_deny for rule in added) or any(rule.is_deny for rule in removed):
        return False
    if after.agents - before.agents or after.learning - before.learning or moved_agents(old, new):
        return False
    for key, live in after.concrete.items():
        known = before.concrete.get(key, Materialised())
        if live.names - known.names or live.sans - known.sans:
            return False
    # A policy number that is new needs its listener before anything is routed to it.
    return set(new.policies) <= set(old.policies)


def moved_agents(old: Plan, new: Plan) -> dict[str, tuple[int, int]]:
    return {
        agent: (old.agents[agent], number)
        for agent, number in new.agents.items()
        if agent in old.agents and old.agents[agent] != number
    }


def lost_destinations(old: Plan, new: Plan) -> tuple[tuple[int, OpaqueTarget], ...]:
    lost = []
    for number, policy in old.policies.items():
        after = new.policies.get(number)
        kept = {(t.l4, t.dst, t.port) for t in after.opaque} if after is not None else set()
        lost += [(number, target) for target in policy.opaque if (target.l4, target.dst, target.port) not in kept]
    return tuple(lost)


def agents_touched(old: Plan, new: Plan) -> int:
    changed = {n for n in {*old.policies, *new.policies} if old.policies.get(n) != new.policies.get(n)}
    return sum(number in changed or old.agents.get(agent) != number for agent, number in new.agents.items())


def changed_rules(before: Sequence[Rule], after: Sequence[Rule]) -> list[tuple[str, Rule]]:
    """The log's name of what happened to each rule that is not as it was, with the rule."""
    old = {rule.id: rule for rule in before}
    new = {rule.id: rule for rule in after}
    return [
        *(("rule_added", new[rule_id]) for rule_id in new.keys() - old.keys()),
        *(("rule_removed", old[rule_id]) for rule_id in old.keys() - new.keys()),
        *(("rule_modified", rule) for rule_id, rule in new.items() if rule_id in old and rule != old[rule_id]),
    ]


def log_rules(changed: Sequence[tuple[str, Rule]]) -> None:
    for event, rule in changed:
        log.info(event, rule=rule.id, dst=rule.dst, scope=rule.scope)
