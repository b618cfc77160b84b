"""
Changing a set of rules: adding with merge, removing, expiring (contract 7.5).

Pure functions from stored rules to stored rules, plus what happened to each. All rules in and
out are valid and normalised; nothing here writes.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from clawker_cp.firewall.paths import effective_default
from clawker_cp.firewall.ports import OPAQUE, effective_ports
from clawker_cp.firewall.rules import DENY, GLOBAL, Rule, normalise, union_paths
from clawker_cp.firewall.spans import PortRange, carve, join


class AddStatus(enum.IntEnum):
    """What adding did; numbers of the wire's `AddRuleStatus`."""

    ADDED = 1
    MODIFIED = 2
    UNCHANGED = 3


class RemoveStatus(enum.IntEnum):
    """What removing did; numbers of the wire's `RemoveRuleStatus`."""

    REMOVED = 1
    PATH_REMOVED = 2
    NOT_FOUND = 3


@dataclass(frozen=True, slots=True)
class Added:
    """Result of adding: the whole new set and one (status, stored rule) per incoming rule."""

    rules: tuple[Rule, ...]
    outcomes: tuple[tuple[AddStatus, Rule], ...]

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return any(status is not AddStatus.UNCHANGED for status, _ in self.outcomes)


@dataclass(frozen=True, slots=True)
class Removed:
    """Result of removing: the whole new set, what went, and the status."""

    rules: tuple[Rule, ...]
    removed: tuple[Rule, ...]
    status: RemoveStatus


# A grant never turns a permanent rule of the same key into an expiring one, nor widens it for
# ever: rules that expire and rules that do not are kept apart.
_Slot = tuple[str, str, bool]


def _slot(rule: Rule) -> _Slot:
    return (rule.scope, rule.key, bool(rule.expires_at))


def merge(present: Rule, incoming: Rule) -> Rule:
    """Lay an incoming rule over the stored one of the same key."""
    return replace(
        present,
        action=incoming.action,
        path_rules=union_paths(present.path_rules, incoming.path_rules),
        path_default=incoming.path_default or present.path_default,
        insecure_skip_tls_verify=incoming.insecure_skip_tls_verify,
        tls=incoming.tls if incoming.tls != "auto" else present.tls,
        allow_private=present.allow_private if incoming.allow_private is None else incoming.allow_private,
        comment=incoming.comment or present.comment,
        source=incoming.source or present.source,
        created_at=present.created_at or incoming.created_at,
        expires_at=incoming.expires_at or present.expires_at,
    )


def add(stored: Sequence[Rule], incoming: Sequence[Rule]) -> Added:
    """Add rules in order; later ones see earlier ones. Stored order is arrival order."""
    rules: dict[tuple[_Slot, str], Rule] = {}
    for rule in stored:
        rules.setdefault((_slot(rule), rule.action), rule)
    outcomes = [_add_one(rules, rule) for rule in incoming]
    return Added(tuple(rules.values()), tuple(outcomes))


def _add_one(rules: dict[tuple[_Slot, str], Rule], rule: Rule) -> tuple[AddStatus, Rule]:
    slot = _slot(rule)
    other = "allow" if rule.is_deny else "deny"
    present = rules.get((slot, rule.action)) or rules.get((slot, other))
    if present is None:
        if _is_redundant(rules.values(), rule):
            return AddStatus.UNCHANGED, rule
        rules[slot, rule.action] = rule
        return AddStatus.ADDED, rule
    merged = merge(present, rule)
    contradicted = present.action == rule.action and (slot, other) in rules
    if merged == present and not contradicted:
        return AddStatus.UNCHANGED, present
    if present.action == rule.action:
        rules[slot, rule.action] = merged
        rules.pop((slot, other), None)  # two actions for one key come from a hand edit; the incoming one wins
    else:
        _replace_in_place(rules, (slot, other), (slot, rule.action), merged)
    return AddStatus.MODIFIED, merged


def _replace_in_place(
    rules: dict[tuple[_Slot, str], Rule], old: tuple[_Slot, str], new: tuple[_Slot, str], rule: Rule
) -> None:
    kept = [(new, rule) if key == old else (key, value) for key, value in rules.items()]
    rules.clear()
    rules.update(kept)


def _is_redundant(rules: Collection[Rule], rule: Rule) -> bool:
    """Whether an opaque rule changes neither what is allowed nor what is denied of its (scope, dst, proto)."""
    if rule.proto not in OPAQUE or rule.expires_at or rule.allow_private is not None:
        return False
    near = [
        one
        for one in rules
        if (one.scope, one.dst, one.proto) == (rule.scope, rule.dst, rule.proto) and not one.expires_at
    ]
    return bool(near) and _standing(near) == _standing([*near, rule])


def _standing(rules: Sequence[Rule]) -> tuple[list[PortRange], list[PortRange]]:
    spans = {
        deny: [effective_ports(one.proto, one.port) for one in rules if one.is_deny is deny] for deny in (False, True)
    }
    return carve(spans[False], spans[True]), join(spans[True])


def remove(
    stored: Sequence[Rule], dst: str, proto: str = "", port: str = "", path: str = "", *, scope: str = GLOBAL
) -> Removed:
    """
    Remove the permanent rule(s) of a key, or one path entry of it.

    The spec is normalised like a rule. Removing an entry never widens: if the effective path
    default would turn to allow, `path_default: deny` is stored (D28).
    """
    key = normalise(Rule(dst, proto, port)).key
    hit = [rule for rule in stored if (rule.scope, rule.key) == (scope, key) and not rule.expires_at]
    if not hit:
        return Removed(tuple(stored), (), RemoveStatus.NOT_FOUND)
    if not path:
        return Removed(tuple(rule for rule in stored if rule not in hit), tuple(hit), RemoveStatus.REMOVED)
    without = {rule: without_path(rule, path.strip()) for rule in hit}
    if all(new is None for new in without.values()):
        return Removed(tuple(stored), (), RemoveStatus.NOT_FOUND)
    return Removed(tuple(without.get(rule) or rule for rule in stored), (), RemoveStatus.PATH_REMOVED)


def without_path(rule: Rule, path: str) -> Rule | None:
    """Return the rule without one path entry, None if it has no such entry."""
    left = tuple(entry for entry in rule.path_rules if entry.path != path)
    if len(left) == len(rule.path_rules):
        return None
    widened = effective_default(rule.path_default, left) and not effective_default(rule.path_default, rule.path_rules)
    return replace(rule, path_rules=left, path_default=DENY if widened else rule.path_default)


def remove_all(stored: Sequence[Rule]) -> Removed:
    """Remove the global permanent rules (`FirewallRemoveRule all`)."""
    return _partition(stored, [rule.scope == GLOBAL and not rule.expires_at for rule in stored])


def remove_scope(stored: Sequence[Rule], scope: str) -> Removed:
    """Remove every rule of a scope, expiring ones included."""
    return _partition(stored, [rule.scope == scope for rule in stored])


def remove_ids(stored: Sequence[Rule], ids: Collection[str]) -> tuple[Removed, tuple[str, ...]]:
    """Remove rules by id; the second value lists ids that no rule has."""
    removed = _partition(stored, [rule.id in ids for rule in stored])
    known = {rule.id for rule in removed.removed}
    return removed, tuple(one for one in ids if one not in known)


def expire(stored: Sequence[Rule], now: float) -> Removed:
    """Remove rules whose time is over; `now` is Unix seconds."""
    return _partition(stored, [bool(rule.expires_at) and rule.expires_at <= now for rule in stored])


def _partition(stored: Sequence[Rule], going: Sequence[bool]) -> Removed:
    kept = tuple(rule for rule, gone in zip(stored, going, strict=True) if not gone)
    gone = tuple(rule for rule, gone in zip(stored, going, strict=True) if gone)
    return Removed(kept, gone, RemoveStatus.REMOVED if gone else RemoveStatus.NOT_FOUND)
