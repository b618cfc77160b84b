"""
What becomes of one port of one name: the decision of contract 7.6 and 7.8, without any numbers.

Given the candidates of a name (or of everything below one), `decide_ports` says per port and
transport who decides. The compile turns that into rows and virtual hosts; `check` into a
verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from clawker_cp.firewall.effective import Candidate, Facts, path_policy
from clawker_cp.firewall.plan import PathPolicy
from clawker_cp.firewall.spans import segments

Rank = tuple[int, int]
NOBODY: Rank = (-1, 0)


@dataclass(frozen=True, slots=True)
class Side:
    """
    HTTP on one port, either inside TLS or plain.

    Denied: `denied_by` is the rule. Allowed: `http` judges ordinary requests, `ws` upgrades, and
    `rules` are the deciding allows, `rules[0]` the one to name.
    """

    rank: Rank
    denied_by: Facts | None = None
    http: PathPolicy | None = None
    ws: PathPolicy | None = None
    rules: tuple[Facts, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether any request can pass."""
        return self.denied_by is None

    @property
    def passthrough(self) -> bool:
        """Whether TLS is passed on unread."""
        return bool(self.rules) and self.rules[0].passthrough


@dataclass(frozen=True, slots=True)
class PortOutcome:
    """
    Ports low..high of a name.

    TCP: `opaque` decides if set; otherwise the proxy reads, `tls` and `plain` say what. UDP: `udp`
    decides if set; otherwise HTTP/3 where `quic`. `conflict` are two allows that contradict
    each other here.
    """

    low: int
    high: int
    opaque: Facts | None = None
    tls: Side | None = None
    plain: Side | None = None
    udp: Facts | None = None
    quic: bool = False
    conflict: tuple[Facts, Facts] | None = None

    @property
    def to_proxy(self) -> bool:
        """Whether TCP goes to the policy's egress listener."""
        return self.opaque is None and (self.tls is not None or self.plain is not None)

    @property
    def left(self) -> bool:
        """Whether anything of the ports is allowed."""
        if self.udp is not None and not self.udp.deny:
            return True
        if self.opaque is not None:
            return not self.opaque.deny
        return any(side is not None and side.allowed for side in (self.tls, self.plain))

    def allows(self) -> Iterable[Facts]:
        """Yield the rules that allow something here, the proxy's first."""
        if self.opaque is None:
            for side in (self.tls, self.plain):
                if side is not None and side.allowed:
                    yield from side.rules
        elif not self.opaque.deny:
            yield self.opaque
        if self.udp is not None and not self.udp.deny:
            yield self.udp

    def denials(self) -> Iterable[Facts]:
        """Yield the rules that deny something here."""
        if self.opaque is None:
            for side in (self.tls, self.plain):
                if side is not None and side.denied_by is not None:
                    yield side.denied_by
        elif self.opaque.deny:
            yield self.opaque
        if self.udp is not None and self.udp.deny:
            yield self.udp


def decide_ports(candidates: Sequence[Candidate]) -> list[PortOutcome]:
    """
    Decide every port that any candidate names; `candidates` as `RuleIndex.candidates` orders them.

    Segments are in port order and do not overlap.
    """
    if len(candidates) == 1:
        return [_alone(candidates[0].facts, candidates[0].rank)]
    wide = [candidate for candidate in candidates if candidate.facts.every_protocol]
    if wide:  # nothing at or below its rank is left, on no port: only narrower allows speak
        candidates = [candidate for candidate in candidates if candidate.rank >= wide[0].rank]
        candidates = [c for c in candidates if not c.facts.every_protocol or c is wide[0]]
    outcomes = []
    for low, high in segments({(c.facts.low, c.facts.high) for c in candidates}):
        here = [c for c in candidates if c.facts.low <= low and high <= c.facts.high]
        outcomes.append(_decide(low, high, here))
    return outcomes


@lru_cache(maxsize=65536)
def _alone(facts: Facts, rank: Rank) -> PortOutcome:
    """Decide the ports of a name that one rule speaks for: the usual case, and the same at every compile."""
    return _decide(facts.low, facts.high, [Candidate(rank, facts)])


def decide_port(candidates: Sequence[Candidate], port: int) -> PortOutcome:
    """Decide one port; an outcome without deciders if no candidate names it."""
    for outcome in decide_ports(candidates):
        if outcome.low <= port <= outcome.high:
            return outcome
    return PortOutcome(port, port)


def _decide(low: int, high: int, here: Sequence[Candidate]) -> PortOutcome:
    opaque = next((c for c in here if not c.facts.http and not c.facts.udp), None)
    udp = next((c for c in here if c.facts.udp or c.facts.every_protocol), None)
    if all(not c.facts.http for c in here):
        return PortOutcome(low, high, opaque.facts if opaque else None, udp=udp.facts if udp else None)
    tls = _side([c for c in here if c.facts.http and c.facts.tls])
    plain = _side([c for c in here if c.facts.http and not c.facts.tls])
    conflict = None
    decider = None
    if opaque is not None:
        decider, conflict = _opaque_or_proxy(opaque, tls, plain)
        if opaque.facts.deny:
            # What it beats the proxy must deny too: the kernel has one answer for the port, and an
            # agent may bring the address of another name.
            tls, plain = (_beaten(side, opaque, always=decider is not None) for side in (tls, plain))
    quic = decider is None and udp is None and tls is not None and tls.allowed and not tls.passthrough
    return PortOutcome(low, high, decider, tls, plain, udp.facts if udp else None, quic, conflict)


def _beaten(side: Side | None, deny: Candidate, *, always: bool) -> Side | None:
    beaten = always if side is None else side.rank <= deny.rank
    return Side(deny.rank, denied_by=deny.facts) if beaten else side


def _opaque_or_proxy(
    opaque: Candidate, tls: Side | None, plain: Side | None
) -> tuple[Facts | None, tuple[Facts, Facts] | None]:
    """Return the opaque rule if it decides over what the proxy would read, and a conflict if there is one."""
    sides = [side for side in (tls, plain) if side is not None]
    allowing = [side for side in sides if side.allowed]
    if opaque.facts.deny:
        if any(side.rank > opaque.rank for side in allowing):
            return None, None
        return opaque.facts, None
    equal = next((side for side in allowing if side.rank == opaque.rank), None)
    conflict = (opaque.facts, equal.rules[0]) if equal else None
    if any(side.rank > opaque.rank for side in sides):
        return None, conflict
    return opaque.facts, conflict


def _side(here: Sequence[Candidate]) -> Side | None:
    """
    Decide one side of HTTP: ordinary requests and upgrades are two kinds of one origin.

    A deny takes its own kind only; the most specific allow that survives names the origin.
    """
    if not here:
        return None
    kinds = {kind: [c for c in here if c.facts.websocket is kind] for kind in (False, True)}
    denies = {kind: next((c for c in found if c.facts.deny), None) for kind, found in kinds.items()}
    living = {
        kind: [c for c in found if not c.facts.deny and c.rank > (denied.rank if denied else NOBODY)]
        for kind, found in kinds.items()
        for denied in (denies[kind],)
    }
    best = max((c.rank for found in living.values() for c in found), default=None)
    if best is None:
        denied = max((c for c in denies.values() if c), key=lambda c: c.rank)
        return Side(denied.rank, denied_by=denied.facts)
    policies: dict[bool, PathPolicy | None] = {}
    rules: list[Facts] = []
    for kind in (False, True):
        deciding = [c.facts for c in living[kind] if c.rank == best]
        rules += deciding
        deny = denies[kind]
        if deciding:
            policies[kind] = path_policy(deciding)
        elif deny is not None and deny.rank >= best:
            policies[kind] = PathPolicy(deny.facts.id, (), default_allow=False, denied=True)
        else:
            policies[kind] = None
    return Side(best, http=policies[False], ws=policies[True], rules=tuple(rules))
