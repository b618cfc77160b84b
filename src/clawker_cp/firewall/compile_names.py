"""
The name half of the compile: rules on names become virtual hosts, listeners, rows and name classes.

A policy's names fall into classes (an exact base, or everything below a base) whose members are
judged alike. Called by `compile.py` only; the address half is `compile_addresses.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from clawker_cp.firewall.allocations import Allocator
from clawker_cp.firewall.effective import Candidate, Facts, RuleIndex
from clawker_cp.firewall.outcomes import PortOutcome, Side, decide_ports
from clawker_cp.firewall.plan import (
    IDENTITY_CATCH_ALL,
    IDENTITY_HTTP,
    IDENTITY_HTTP_TCP,
    IDENTITY_NONE,
    TCP,
    UDP,
    DeniedHost,
    HttpOrigin,
    Materialised,
    NameClass,
    OpaqueTarget,
    Passthrough,
    PathPolicy,
    RouteAction,
    RouteRow,
)
from clawker_cp.firewall.rules import Rule

Conflict = tuple[Rule, Rule, str, str]  # first, second, field, text

# Ports that a learning agent's TLS and HTTP go through the proxy on, whatever its rules (R38).
LEARN_PORTS = frozenset({80, 443})


@dataclass(slots=True)
class NamePart:
    """What the names of one policy compile to; filled by `compile_names`."""

    origins: list[HttpOrigin] = field(default_factory=list)
    denied_hosts: list[DeniedHost] = field(default_factory=list)
    passthrough: list[Passthrough] = field(default_factory=list)
    opaque: dict[tuple[int, str, int], OpaqueTarget] = field(default_factory=dict)
    sans: set[str] = field(default_factory=set)
    http_ports: set[int] = field(default_factory=set)
    quic_ports: set[int] = field(default_factory=set)
    exact: dict[str, NameClass] = field(default_factory=dict)
    below: dict[str, NameClass] = field(default_factory=dict)
    concrete: dict[str, int] = field(default_factory=dict)
    routes: list[RouteRow] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    live: Materialised = field(default_factory=Materialised)


@dataclass(slots=True, eq=False)
class _Class:
    base: str
    is_below: bool
    outcomes: list[PortOutcome]
    sides: dict[tuple[int, bool], Side]  # (port, tls) -> who reads, for the proxy


class NameCompiler:
    """Compiles the names of one policy; used once."""

    def __init__(
        self,
        policy: int,
        egress_port: int,
        facts: Iterable[Facts],
        allocator: Allocator,
        materialised: Materialised,
        *,
        http3: bool,
        learn: bool,
    ) -> None:
        self._policy = policy
        self._egress = egress_port
        self._facts = list(facts)
        self._index = RuleIndex(self._facts)
        self._allocator = allocator
        self._wanted = materialised
        self._http3 = http3
        self._learn = learn
        self._part = NamePart()
        self._below: dict[str, _Class] = {}
        self._denied: dict[tuple[str, bool, str, bool], list[int]] = {}

    def run(self) -> NamePart:
        """Compile; raises `allocations.ExhaustedError` when a band is used up."""
        part = self._part
        part.http_ports = {one.low for one in self._facts if one.http}
        if self._learn:
            part.http_ports |= LEARN_PORTS
        for base in self._index.subtree_bases():
            self._below[base] = self._classify(base, is_below=True)
        classes = [*self._below.values(), *(self._classify(base, is_below=False) for base in self._index.by_base)]
        for one in classes:
            self._proxy_side(one)
        for (base, wildcard, rule_id, tls), ports in self._denied.items():
            part.denied_hosts.append(DeniedHost(base, wildcard, tuple(sorted(ports)), rule_id, tls))
        for one in classes:
            self._name_class(one)
        self._concrete_names()
        self._deep_sans()
        self._shared_rows()
        return part

    # -- classes -----------------------------------------------------------------------------

    def _classify(self, base: str, *, is_below: bool) -> _Class:
        outcomes = decide_ports(self._index.candidates(base, below=is_below))
        sides: dict[tuple[int, bool], Side] = {}
        for outcome in outcomes:
            if outcome.conflict:
                self._conflict(*outcome.conflict)
            if _is_everything(outcome) and outcome.opaque is not None:
                denied = Side((0, 1), denied_by=outcome.opaque)
                ports = (port for port in self._part.http_ports if outcome.low <= port <= outcome.high)
                sides.update({(port, tls): denied for port in ports for tls in (True, False)})
                continue
            for tls, side in ((True, outcome.tls), (False, outcome.plain)):
                if side is not None:
                    sides[outcome.low, tls] = side
            if outcome.quic and self._http3:
                self._part.quic_ports.add(outcome.low)
        found = _Class(base, is_below, outcomes, sides)
        self._check_modes(found)
        return found

    def _conflict(self, opaque: Facts, http: Facts) -> None:
        text = f"{opaque.rule.key} and {http.rule.key} both want this port: one is read by the proxy, one is not"
        self._part.conflicts.append((opaque.rule, http.rule, "port", text))

    def _check_modes(self, found: _Class) -> None:
        """One name is either inspected or passed through, and passed through on one port (7.3 point 9)."""
        reading = [(port, one) for (port, tls), side in found.sides.items() if tls for one in side.rules]
        passing = [entry for entry in reading if entry[1].passthrough]
        if not passing:
            return
        port, rule = passing[0]
        for other_port, other in reading:
            if not other.passthrough:
                text = f"{rule.rule.key} passes {found.base} through unread, {other.rule.key} inspects it"
                self._part.conflicts.append((rule.rule, other.rule, "tls", text))
            elif other_port != port:
                text = f"{rule.rule.key} and {other.rule.key} pass {found.base} through on two ports, one is possible"
                self._part.conflicts.append((rule.rule, other.rule, "port", text))

    def _inherited(self, found: _Class) -> _Class | None:
        """Return the class whose virtual hosts the proxy would use if this one had none."""
        suffix = found.base.partition(".")[2] if found.is_below else found.base
        while suffix:
            if suffix in self._below:
                return self._below[suffix]
            suffix = suffix.partition(".")[2]
        return None

    # -- proxy -------------------------------------------------------------------------------

    def _proxy_side(self, found: _Class) -> None:
        """Write virtual hosts where the class differs from the one it would fall to."""
        parent = self._inherited(found)
        name = f"*.{found.base}" if found.is_below else found.base
        for (port, tls), side in found.sides.items():
            if parent is not None and _same(parent.sides.get((port, tls)), side):
                continue
            if side.denied_by is not None:
                denied = (found.base, found.is_below, side.denied_by.id, tls)
                self._denied.setdefault(denied, []).append(port)
            elif side.passthrough:
                self._part.passthrough.append(Passthrough(found.base, found.is_below, port, side.rules[0].id))
                continue
            else:
                insecure = bool((side.http or side.ws or _NO_POLICY).insecure)
                self._part.origins.append(
                    HttpOrigin(found.base, found.is_below, port, tls, side.http, side.ws, insecure)
                )
            if tls:
                self._part.sans.add(name)
                if found.is_below:
                    self._part.sans.add(found.base)

    # -- gate --------------------------------------------------------------------------------

    def _name_class(self, found: _Class) -> None:
        allows = [one for outcome in found.outcomes for one in outcome.allows()]
        denials = [one for outcome in found.outcomes for one in outcome.denials()]
        into = self._part.below if found.is_below else self._part.exact
        if not allows:
            if denials:
                into[found.base] = NameClass(False, "rule_deny", denials[0].id)
            return
        best = max(allows, key=lambda one: (one.destination.labels, not one.destination.wildcard))
        wildcard_opaque = any(
            not one.deny and not one.http and one.destination.wildcard for one in _opaque(found.outcomes)
        )
        identity = IDENTITY_NONE
        if not any(_opaque(found.outcomes)):
            quic = self._http3 and any(outcome.quic for outcome in found.outcomes)
            identity = IDENTITY_HTTP if quic else IDENTITY_HTTP_TCP
        elif not wildcard_opaque:
            identity = self._allocator.identity(f"*.{found.base}" if found.is_below else found.base)
            self._own_rows(identity, found.outcomes, found.base)
        into[found.base] = NameClass(
            allowed=True,
            rule_id=best.id,
            identity=identity,
            allow_private=bool(best.rule.allow_private),
            zone=best.base if best.destination.wildcard else "",
            wildcard_opaque=wildcard_opaque,
            inspected=any(
                outcome.tls is not None
                and outcome.opaque is None
                and outcome.tls.allowed
                and not outcome.tls.passthrough
                for outcome in found.outcomes
            ),
        )

    def class_of(self, name: str) -> NameClass | None:
        """Return the class of a name, as the gate's name table would."""
        if name in self._part.exact:
            return self._part.exact[name]
        suffix = name.partition(".")[2]
        while suffix:
            if suffix in self._part.below:
                return self._part.below[suffix]
            suffix = suffix.partition(".")[2]
        return None

    def _concrete_names(self) -> None:
        """Give listeners to the live names of opaque wildcards; forget those that no longer need them."""
        for name in sorted(self._wanted.names):
            found = self.class_of(name)
            if found is None or not found.wildcard_opaque:
                continue
            identity = self._allocator.identity(name)
            self._part.concrete[name] = identity
            candidates = self._index.candidates(name) if name in self._index.by_base else self._candidates_below(name)
            self._own_rows(identity, decide_ports(candidates), name)

    def _candidates_below(self, name: str) -> list[Candidate]:
        suffix = name.partition(".")[2]
        while suffix not in self._below:
            suffix = suffix.partition(".")[2]
        return self._index.candidates(suffix, below=True)

    def _deep_sans(self) -> None:
        needed = set()
        for san in self._wanted.sans:
            parent = san.removeprefix("*.")
            found = self.class_of(f"x.{parent}")
            if found is not None and found.inspected and san not in self._part.sans:
                needed.add(san)
        self._part.sans |= needed
        self._part.live = Materialised(frozenset(self._part.concrete), frozenset(needed))

    # -- kernel ------------------------------------------------------------------------------

    def _own_rows(self, identity: int, outcomes: Iterable[PortOutcome], name: str) -> None:
        """Write the rows of an identity of its own: proxy, dedicated listeners, denials."""
        for outcome in outcomes:
            if _is_everything(outcome):
                continue  # nothing is routed, and what is not routed is denied
            if outcome.to_proxy:
                self._proxy_rows(identity, outcome)
            for l4, facts in ((TCP, outcome.opaque), (UDP, outcome.udp)):
                if facts is not None:
                    self._opaque_rows(identity, outcome, l4, facts, name)

    def _proxy_rows(self, identity: int, outcome: PortOutcome) -> None:
        expires = _latest([one for one in (*outcome.allows(), *outcome.denials()) if one.http])
        tcp = RouteRow(self._policy, identity, outcome.low, TCP, RouteAction.PROXY, self._egress, -1, expires)
        self._part.routes.append(tcp)
        if outcome.quic and self._http3:
            self._part.routes.append(
                RouteRow(self._policy, identity, outcome.low, UDP, RouteAction.PROXY, self._egress, -1, expires)
            )

    def _opaque_rows(self, identity: int, outcome: PortOutcome, l4: int, facts: Facts, name: str) -> None:
        number = self._allocator.rule(facts.id)
        for port in range(outcome.low, outcome.high + 1):
            action, listen = RouteAction.DENY, 0
            if not facts.deny:
                action, listen = RouteAction.PROXY, self._allocator.listener(l4, name, port)
                self._part.opaque[l4, name, port] = OpaqueTarget(name, l4, port, listen, facts.id)
            self._part.routes.append(
                RouteRow(self._policy, identity, port, l4, action, listen, number, facts.rule.expires_at)
            )

    def _shared_rows(self) -> None:
        """Write the rows that all HTTP names share, and the catch-all (R11)."""
        by_port: dict[int, list[Facts]] = {port: [] for port in self._part.http_ports}
        for one in self._facts:
            if one.http:
                by_port[one.low].append(one)
        for port, rules in by_port.items():
            expires = 0.0 if self._learn and port in LEARN_PORTS else _latest(rules)
            for identity in (IDENTITY_CATCH_ALL, IDENTITY_HTTP, IDENTITY_HTTP_TCP):
                self._part.routes.append(
                    RouteRow(self._policy, identity, port, TCP, RouteAction.PROXY, self._egress, -1, expires)
                )
            if port in self._part.quic_ports:
                self._part.routes.append(
                    RouteRow(self._policy, IDENTITY_HTTP, port, UDP, RouteAction.PROXY, self._egress, -1, expires)
                )


_NO_POLICY = PathPolicy("", (), default_allow=False)


def _is_everything(outcome: PortOutcome) -> bool:
    return outcome.opaque is not None and outcome.opaque.every_protocol


def _opaque(outcomes: Iterable[PortOutcome]) -> Iterator[Facts]:
    for outcome in outcomes:
        if _is_everything(outcome):
            continue
        if outcome.opaque is not None:
            yield outcome.opaque
        if outcome.udp is not None:
            yield outcome.udp


def _same(inherited: Side | None, side: Side) -> bool:
    if inherited is None:
        return False
    if inherited.denied_by is not None or side.denied_by is not None:
        return inherited.denied_by is side.denied_by
    return inherited.rules == side.rules and (inherited.http, inherited.ws) == (side.http, side.ws)


def _latest(rules: Iterable[Facts]) -> float:
    """Return when the last of the rules ends, 0 if one never does."""
    ends = [one.rule.expires_at for one in rules]
    return 0.0 if not ends or 0.0 in ends else max(ends)
