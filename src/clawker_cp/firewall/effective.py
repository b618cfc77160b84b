"""
Which rules hold for an agent, which speak for a name, and which of those decides (contract 7.6).

The reading of single rules (`Facts`) and the candidate search shared by the compile, by `check`
and by the listing of effective rules. Knows no ports bands, listeners or identities.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from clawker_cp.firewall.destinations import Destination, Kind, parse_destination
from clawker_cp.firewall.paths import effective_default, ordered
from clawker_cp.firewall.plan import TCP, UDP, PathPolicy
from clawker_cp.firewall.ports import HTTP_FAMILY, MAX_PORT, TLS_PROTOCOLS, effective_ports
from clawker_cp.firewall.rules import GLOBAL, PROTO_ANY, Rule, scope_order, scopes_of
from clawker_cp.firewall.spans import PortRange, carve


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """One rule, read once: destination, ports, and what its protocol implies. Compared by identity."""

    rule: Rule
    id: str
    destination: Destination
    low: int
    high: int
    deny: bool
    http: bool
    tls: bool  # https, wss
    websocket: bool  # ws, wss
    udp: bool  # speaks for UDP only
    passthrough: bool

    @property
    def kind(self) -> Kind:
        """Name, address or CIDR."""
        return self.destination.kind

    @property
    def base(self) -> str:
        """The name without dots at its ends, or the address as text."""
        return self.destination.base

    @property
    def every_protocol(self) -> bool:
        """Whether it is a widened deny: every port and protocol of its destination (contract 7.9)."""
        return self.rule.proto == PROTO_ANY


@lru_cache(maxsize=65536)
def _facts(rule: Rule, tls_minimal: bool) -> Facts:
    if rule.proto == PROTO_ANY:
        low, high = 1, MAX_PORT
    else:
        low, high = effective_ports(rule.proto, rule.port)
    quiet = not (rule.path_rules or rule.path_default or rule.insecure_skip_tls_verify)
    passthrough = rule.tls == "passthrough" or (tls_minimal and rule.tls == "auto" and quiet)
    return Facts(
        rule=rule,
        id=rule.id,
        destination=parse_destination(rule.dst),
        low=low,
        high=high,
        deny=rule.is_deny,
        http=rule.proto in HTTP_FAMILY,
        tls=rule.proto in TLS_PROTOCOLS,
        websocket=rule.proto in ("ws", "wss"),
        udp=rule.proto == "udp",
        passthrough=passthrough and rule.proto == "https",
    )


def read_rule(rule: Rule, *, tls_minimal: bool = False) -> Facts:
    """Read one valid, normalised rule."""
    return _facts(rule, tls_minimal)


def is_live(rule: Rule, now: float) -> bool:
    """Whether a rule has not expired."""
    return not rule.expires_at or rule.expires_at > now


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rule that matches a name, with how specific it is there; the larger rank decides."""

    rank: tuple[int, int]  # specificity, 1 for a deny
    facts: Facts


class RuleIndex:
    """The name rules of one policy by base, for finding those that speak for a name."""

    def __init__(self, facts: Iterable[Facts]) -> None:
        self.by_base: defaultdict[str, list[Facts]] = defaultdict(list)
        for one in facts:
            if one.kind is Kind.NAME:
                self.by_base[one.base].append(one)

    def subtree_bases(self) -> Iterator[str]:
        """Yield the bases that speak for names below them."""
        for base, rules in self.by_base.items():
            if any(one.deny or one.destination.wildcard for one in rules):
                yield base

    def candidates(self, name: str, *, below: bool = False) -> list[Candidate]:
        """
        Return the rules that match a name, most decisive first.

        `below`: for any name strictly below `name` that no longer base covers.
        """
        found: list[Candidate] = []
        suffix = name
        while True:
            for one in self.by_base.get(suffix, ()):
                exact = not one.destination.wildcard
                itself = exact and not below and suffix == name
                if not (one.deny or itself or not exact):
                    continue
                found.append(Candidate((one.destination.labels + itself, int(one.deny)), one))
            dot = suffix.find(".")
            if dot < 0:
                break
            suffix = suffix[dot + 1 :]
        # Ties: a permanent rule decides before a grant (its rows have no deadline), then the
        # narrower scope is named as the decider.
        found.sort(key=lambda c: (c.rank, *_tie(c.facts)), reverse=True)
        return found


def _tie(facts: Facts) -> tuple[float, tuple[int, str], str]:
    return (facts.rule.expires_at or math.inf, scope_order(facts.rule.scope), facts.id)


def policy_key(agent_key: str, scopes: Iterable[str], learn: frozenset[str] = frozenset()) -> str:
    """Return the most specific scope of an agent that has a rule (or is learning), else `global`."""
    present = set(scopes) | learn
    return next((scope for scope in reversed(scopes_of(agent_key)) if scope in present), GLOBAL)


def specificity(facts: Facts) -> tuple[int, int, int]:
    """Sort key of rules by their own destination: names by labels, addresses by prefix; larger is narrower."""
    if facts.destination.network is not None:
        return (0, facts.destination.network.prefixlen, int(facts.deny))
    return (1, facts.destination.labels + (not facts.destination.wildcard), int(facts.deny))


def most_specific_first(facts: Iterable[Facts]) -> list[Facts]:
    """Order rules for listings: most specific first, deny before allow, then by scope and key."""
    return sorted(facts, key=lambda f: (*(-part for part in specificity(f)), scope_order(f.rule.scope), f.rule.key))


def path_policy(rules: Sequence[Facts]) -> PathPolicy:
    """
    Join the HTTP rules of one origin and kind that decide together (one dst, several scopes).

    The first names the policy. Entries of all are tried in one order; requests that no entry
    names are allowed if any of the rules allows them by default.
    """
    entries = [entry for one in rules for entry in one.rule.path_rules]
    default = any(effective_default(one.rule.path_default, one.rule.path_rules) for one in rules)
    return PathPolicy(rules[0].id, ordered(entries), default, insecure=rules[0].rule.insecure_skip_tls_verify)


@dataclass(frozen=True, slots=True)
class EffectiveRule:
    """
    One rule as it holds for an agent (contract 2.4 `EffectiveRule`).

    `spans`: (low, high, "tcp" or "udp") left of its ports, empty = nothing is left.
    """

    rule: Rule
    spans: tuple[tuple[int, int, str], ...]
    overridden_by: tuple[str, ...]
    address_level: bool
    path_default: str


def transports(facts: Facts) -> tuple[int, ...]:
    """Return the transports a rule speaks for; https and wss have HTTP/3 beside TCP."""
    if facts.every_protocol or (facts.tls and not (facts.passthrough and not facts.deny)):
        return (TCP, UDP)
    return (UDP,) if facts.udp else (TCP,)


def _overrides(winner: Facts, loser: Facts) -> bool:
    """Whether a deny takes ports of an allow, by the allow's own destination."""
    if not winner.deny or loser.deny:
        return False
    if loser.destination.network is not None:
        ours, theirs = winner.destination.network, loser.destination.network
        return ours == theirs
    if winner.destination.network is not None:
        return False
    covered = loser.base == winner.base or loser.base.endswith("." + winner.base)
    if not covered:
        return False
    exact_here = not winner.destination.wildcard and not loser.destination.wildcard and winner.base == loser.base
    own = loser.destination.labels + (not loser.destination.wildcard)
    return winner.destination.labels + exact_here >= own


def _same_class(winner: Facts, loser: Facts) -> bool:
    """Whether a deny's protocol reaches the allow's: the port itself (opaque), or the same kind of request."""
    if winner.http and loser.http:
        return (winner.tls, winner.websocket) == (loser.tls, loser.websocket)
    return True


def listing(rules: Iterable[Rule], *, tls_minimal: bool = False) -> list[EffectiveRule]:
    """List effective rules, most specific first, with what denials leave of each allow's ports."""
    facts = most_specific_first(read_rule(rule, tls_minimal=tls_minimal) for rule in rules)
    by_base: defaultdict[str, list[Facts]] = defaultdict(list)
    for one in facts:
        if one.deny:
            by_base[one.base].append(one)
    return [_listed(one, list(_deniers(one, by_base))) for one in facts]


def _deniers(facts: Facts, by_base: defaultdict[str, list[Facts]]) -> Iterator[Facts]:
    suffix = facts.base
    while suffix:
        yield from (one for one in by_base.get(suffix, ()) if _overrides(one, facts) and _same_class(one, facts))
        suffix = suffix.partition(".")[2] if facts.kind is Kind.NAME else ""


def _listed(facts: Facts, deniers: list[Facts]) -> EffectiveRule:
    spans: list[tuple[int, int, str]] = []
    overriding: list[str] = []
    for l4 in transports(facts):
        holes: list[PortRange] = []
        for one in deniers:
            if l4 in transports(one) and one.low <= facts.high and facts.low <= one.high:
                holes.append((one.low, one.high))
                overriding.append(one.id)
        left = carve([(facts.low, facts.high)], holes)
        spans += [(low, high, "udp" if l4 == UDP else "tcp") for low, high in left]
    default = ""
    if facts.http:
        allow = not facts.deny and effective_default(facts.rule.path_default, facts.rule.path_rules)
        default = "allow" if allow else "deny"
    return EffectiveRule(facts.rule, tuple(spans), tuple(dict.fromkeys(overriding)), facts.kind is Kind.CIDR, default)
