"""
Numbers that outlive a compile: policies, proxy listeners, route identities.

Sticky: who has a number keeps it, so adding a rule never renumbers another. `Allocations` is a
frozen snapshot; the compile works on an `Allocator` made from it and hands back the next
snapshot. Keeping it on disk is `allocation_files.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from clawker_cp.firewall.plan import IDENTITY_FIRST, TCP, UDP
from clawker_cp.firewall.rules import GLOBAL

POLICY_GLOBAL = 1
POLICY_FIRST = 2
POLICY_LAST = 1001
EGRESS_GLOBAL = 10000
EGRESS_BASE = 12000

IDENTITY_LAST = 2**32 - 1

# Ports of others that lie near the bands (R4): host proxy, Envoy's and the gate's health.
NEVER = frozenset({18374, 18901, 18902})

BANDS: Mapping[int, tuple[range, ...]] = MappingProxyType(
    {
        TCP: (range(10001, 11000), range(13000, 23000)),
        UDP: (range(11001, 12000), range(23000, 32000)),
    }
)

# A released listener or policy number rests this long: kernel rows of the old generation live
# on for a second (R10), sockets and access records a little longer.
REST_S = 60.0

ListenerKey = tuple[int, str, int]  # l4, destination, port
Use = tuple[str, tuple[Any, ...], int]  # what was asked, with which arguments, the number given
RestKey = tuple[str, str | ListenerKey]  # ("policy", key), ("listener", key), ("rule", id)


class ExhaustedError(Exception):
    """A band has no free number; `limit` is the bound's name. Turned into a Problem by the compile."""

    def __init__(self, limit: str) -> None:
        super().__init__(limit)
        self.limit = limit


def egress_port(policy: int) -> int:
    """Return the egress listener of a policy (contract 1.1)."""
    return EGRESS_GLOBAL if policy == POLICY_GLOBAL else EGRESS_BASE + policy - POLICY_FIRST


def listener_ports(l4: int) -> Iterator[int]:
    """Yield the numbers of a dedicated band in the order they are given out."""
    for band in BANDS[l4]:
        yield from (port for port in band if port not in NEVER)


@dataclass(frozen=True, slots=True)
class Allocations:
    """
    One snapshot of all numbers given out.

    `resting` holds released numbers and until when (Unix seconds) they stay unused. `rules` are
    the indices that kernel rows and records name rules by: sticky, so that removing one rule
    changes no row of another. Neither is persisted: a start writes all rows anew.
    """

    policies: Mapping[str, int] = field(default_factory=dict, hash=False)
    next_policy: int = POLICY_FIRST
    listeners: Mapping[ListenerKey, int] = field(default_factory=dict, hash=False)
    identities: Mapping[str, int] = field(default_factory=dict, hash=False)
    next_identity: int = IDENTITY_FIRST
    resting: Mapping[RestKey, tuple[int, float]] = field(default_factory=dict, hash=False)
    rules: Mapping[str, int] = field(default_factory=dict, hash=False)


EMPTY = Allocations()


class Allocator:
    """
    Hands out numbers for one compile, on top of a snapshot.

    Asking for something that has a number returns that number. What is not asked for until
    `finish` is released. Not shared, not thread-safe. A number whose port is `busy`, held by a
    program other than the proxy, is not given out, nor kept.
    """

    def __init__(
        self,
        snapshot: Allocations,
        *,
        max_policies: int = POLICY_LAST,
        busy: frozenset[tuple[int, int]] = frozenset(),
        now: float = 0.0,
    ) -> None:
        self._old = snapshot
        self._busy = busy
        self._now = now
        self._max_policies = min(max_policies, POLICY_LAST)
        self._policies: dict[str, int] = {}
        self._listeners: dict[ListenerKey, int] = {}
        self._identities: dict[str, int] = {}
        self._next_policy = snapshot.next_policy
        self._next_identity = snapshot.next_identity
        self._resting = {key: rest for key, rest in snapshot.resting.items() if rest[1] > now}
        resting_listeners = {(key[1][0], rest[0]) for key, rest in self._resting.items() if isinstance(key[1], tuple)}
        self._taken_listeners = {(key[0], port) for key, port in snapshot.listeners.items()} | resting_listeners
        self._taken_policies = set(snapshot.policies.values())
        self._taken_policies |= {rest[0] for key, rest in self._resting.items() if key[0] == "policy"}
        self._taken_identities = set(snapshot.identities.values())
        self._free = {l4: listener_ports(l4) for l4 in BANDS}
        self._rules: dict[str, int] = {}
        self._taken_rules = set(snapshot.rules.values())
        self._taken_rules |= {rest[0] for key, rest in self._resting.items() if key[0] == "rule"}
        self._next_rule = 0
        self._uses: list[Use] = []

    def policy(self, key: str) -> int:
        """Return the number of a policy key; raises `ExhaustedError("policies")`."""
        if key == GLOBAL:
            return POLICY_GLOBAL
        known = self._policies.get(key) or self._old.policies.get(key) or self._rested("policy", key)
        if known is not None and (TCP, egress_port(known)) in self._busy:
            known = None  # taken by another program while no proxy held it
        number = known if known is not None else self._new_policy()
        if len(self._policies) + 2 > self._max_policies and key not in self._policies:
            raise ExhaustedError("policies")
        self._policies[key] = number
        return number

    def _rested(self, kind: str, key: str | ListenerKey) -> int | None:
        rest = self._resting.pop((kind, key), None)
        return rest[0] if rest else None

    def _new_policy(self) -> int:
        for step in range(POLICY_LAST - POLICY_FIRST + 1):
            number = POLICY_FIRST + (self._next_policy - POLICY_FIRST + step) % (POLICY_LAST - POLICY_FIRST + 1)
            free = number not in self._taken_policies and (TCP, egress_port(number)) not in self._busy
            if free:
                self._taken_policies.add(number)
                self._next_policy = number + 1 if number < POLICY_LAST else POLICY_FIRST
                return number
        raise ExhaustedError("policies")

    def listener(self, l4: int, dst: str, port: int) -> int:
        """Return the lowest free port of the band for (l4, dst, port); raises `ExhaustedError("listeners")`."""
        key = (l4, dst, port)
        number = self._listeners.get(key) or self._old.listeners.get(key) or self._rested("listener", key)
        if number is None or (l4, number) in self._busy:
            number = self._new_listener(l4)
        self._listeners[key] = number
        self._uses.append(("listener", key, number))
        return number

    def _new_listener(self, l4: int) -> int:
        for number in self._free[l4]:
            if (l4, number) not in self._taken_listeners and (l4, number) not in self._busy:
                self._taken_listeners.add((l4, number))
                return number
        raise ExhaustedError("listeners")

    def identity(self, dst: str) -> int:
        """Return the identity of a destination; numbers go round and are not reused before the wrap."""
        number = self._identities.get(dst) or self._old.identities.get(dst)
        if number is None:
            number = self._next_identity
            while number in self._taken_identities:
                number = number + 1 if number < IDENTITY_LAST else IDENTITY_FIRST
            self._taken_identities.add(number)
            self._next_identity = number + 1 if number < IDENTITY_LAST else IDENTITY_FIRST
        self._identities[dst] = number
        self._uses.append(("identity", (dst,), number))
        return number

    def rule(self, rule_id: str) -> int:
        """Return the index that kernel rows name a rule by; the lowest free one if it has none."""
        number = self._rules.get(rule_id)
        if number is None:
            number = self._old.rules.get(rule_id)
        if number is None:
            number = self._rested("rule", rule_id)
        if number is None:
            while self._next_rule in self._taken_rules:
                self._next_rule += 1
            number = self._next_rule
            self._taken_rules.add(number)
        self._rules[rule_id] = number
        self._uses.append(("rule", (rule_id,), number))
        return number

    def take_uses(self) -> tuple[Use, ...]:
        """Return what was asked for since the last call, and what it got."""
        uses, self._uses = tuple(dict.fromkeys(self._uses)), []
        return uses

    def repeat(self, uses: Iterable[Use]) -> bool:
        """Ask for everything again; returns whether all numbers are the same as then."""
        asked: dict[str, Callable[..., int]] = {
            "listener": self.listener,
            "identity": self.identity,
            "rule": self.rule,
        }
        same = [asked[kind](*arguments) == number for kind, arguments, number in uses]
        self._uses.clear()
        return all(same)

    def rule_ids(self) -> tuple[str, ...]:
        """Return rule ids by index, "" where an index is unused."""
        ids = [""] * (max(self._rules.values(), default=-1) + 1)
        for rule_id, number in self._rules.items():
            ids[number] = rule_id
        return tuple(ids)

    def finish(self) -> Allocations:
        """Return the next snapshot; equal to the old one if nothing was given out or released."""
        resting = dict(self._resting)
        until = self._now + REST_S
        for key, number in self._old.policies.items():
            if key not in self._policies:
                resting["policy", key] = (number, until)
        for listener, number in self._old.listeners.items():
            if listener not in self._listeners:
                resting["listener", listener] = (number, until)
        for rule_id, number in self._old.rules.items():
            if rule_id not in self._rules:
                resting["rule", rule_id] = (number, until)
        return Allocations(
            policies=self._policies,
            next_policy=self._next_policy,
            listeners=self._listeners,
            identities=self._identities,
            next_identity=self._next_identity,
            resting=resting,
            rules=self._rules,
        )
