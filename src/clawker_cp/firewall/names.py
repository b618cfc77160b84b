"""
The gate's view of a plan: may this name be resolved, under which identity (contract 7.8, R8).

Built from a `Policy`; matching is the compiled matcher of `accel`. No I/O, no clock: a table is
valid as long as its plan is.
"""

from __future__ import annotations

from collections.abc import Mapping

from clawker_cp.accel import NameMatcher
from clawker_cp.firewall.plan import IDENTITY_BYPASS, NameClass, NameVerdict, Plan, Policy

NOT_ALLOWED = NameVerdict(False, "not_allowed")
LEARNING = NameVerdict(True, "answered", identity=IDENTITY_BYPASS)


class NameTable:
    """Answers for one policy; immutable, so it may be swapped under a running gate."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._concrete = policy.concrete
        self._sans = frozenset(policy.sans)
        # Exact names are judged here once; names below a base may each need numbers of their own.
        self._plain: list[NameVerdict | None] = [
            _plain_verdict(found) or self._particular(found, base) for base, found in policy.exact.items()
        ]
        self._plain += [_plain_verdict(found) for found in policy.below.values()]
        self._classes = [*policy.exact.values(), *policy.below.values()]
        exact = {base: position for position, base in enumerate(policy.exact)}
        below = {base: position for position, base in enumerate(policy.below, len(exact))}
        # The compile gives every base an exact class too, so `below` never decides an apex.
        self._matcher = NameMatcher(exact, below)

    def decide(self, name: str) -> NameVerdict:
        """
        Judge one name, in any case, with or without a trailing dot.

        `concrete` or `san` set: `Reconciler.materialise` has to be awaited, then ask again.
        """
        position: int = self._matcher.match(name)
        if position < 0:
            return LEARNING if self.policy.learn else NOT_ALLOWED
        plain = self._plain[position]
        if plain is not None:
            return plain
        return self._particular(self._classes[position], name.rstrip(".").lower())

    def _particular(self, found: NameClass, name: str) -> NameVerdict:
        """Judge a name for which numbers or a certificate of its own may be needed."""
        identity = self._concrete.get(name, 0) if found.wildcard_opaque else found.identity
        return NameVerdict(
            allowed=True,
            rule_id=found.rule_id,
            identity=identity,
            allow_private=found.allow_private,
            zone=found.zone,
            concrete=found.wildcard_opaque and not identity,
            san=self._missing_san(name) if found.inspected else "",
        )

    def _missing_san(self, name: str) -> str:
        parent = f"*.{name.partition('.')[2]}"
        return "" if name in self._sans or parent in self._sans else parent


def _plain_verdict(found: NameClass) -> NameVerdict | None:
    """Return the verdict that all names of a class share, None if it depends on the name."""
    if not found.allowed:
        return NameVerdict(False, found.reason, found.rule_id)
    if found.wildcard_opaque or found.inspected:
        return None
    return NameVerdict(True, found.reason, found.rule_id, found.identity, found.allow_private, found.zone)


class NameTables:
    """All policies of a plan; policies that did not change keep their table."""

    def __init__(self, plan: Plan, previous: NameTables | None = None) -> None:
        old: Mapping[int, NameTable] = previous.tables if previous else {}
        self.plan = plan
        self.tables: dict[int, NameTable] = {}
        for number, policy in plan.policies.items():
            table = old.get(number)
            self.tables[number] = table if table is not None and table.policy == policy else NameTable(policy)

    def decide(self, policy: int, name: str) -> NameVerdict:
        """Judge a name for a policy; an unknown policy allows nothing (I1)."""
        table = self.tables.get(policy)
        return table.decide(name) if table is not None else NOT_ALLOWED
