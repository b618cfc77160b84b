"""
Judging rules before anything is done with them (contract 7.3 points 1-9, bounds of 5.5).

All rules of a request are judged and all problems reported, each with its index and `dst`.
What only shows when rules meet (point 10) is found by `compile.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from clawker_cp.firewall.destinations import Destination, DestinationError, Kind, parse_destination
from clawker_cp.firewall.paths import MAX_ENTRIES, path_problem
from clawker_cp.firewall.ports import HTTP_FAMILY, PROTOCOLS, PortError, parse_ports
from clawker_cp.firewall.rules import DENY, Problem, Rule, normalise, normalise_proto, valid_scope

MAX_RULES_PER_REQUEST = 5_000
MAX_RULES_STORED = 20_000
MAX_COMMENT = 200
MAX_RANGE_NAME = 1024
MAX_RANGE_WILDCARD = 16

_DECISIONS = frozenset({"", "allow", "deny"})
_TLS_MODES = frozenset({"", "auto", "inspect", "passthrough"})
_METHOD = re.compile(r"[A-Za-z][A-Za-z-]*")

Finding = tuple[str, str]  # field, text


@dataclass(frozen=True, slots=True)
class Validation:
    """Result of judging a request; `rules` are normalised and only meaningful without problems."""

    rules: tuple[Rule, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


def validate(rules: Sequence[Rule]) -> Validation:
    """Judge all rules of a request; never raises for a bad rule."""
    problems: list[Problem] = []
    warnings: list[Problem] = []
    if len(rules) > MAX_RULES_PER_REQUEST:
        text = f"has {len(rules)} rules, at most {MAX_RULES_PER_REQUEST} are taken at once"
        problems.append(Problem(MAX_RULES_PER_REQUEST, "", "request", text, "CAPACITY", "rules"))
        return Validation((), tuple(problems), ())
    for index, rule in enumerate(rules):
        problems += (Problem(index, rule.dst, field, text) for field, text in rule_problems(rule))
        warnings += (Problem(index, rule.dst, field, text) for field, text in rule_warnings(rule))
    return Validation(tuple(normalise(rule) for rule in rules), tuple(problems), tuple(warnings))


def rule_problems(rule: Rule) -> list[Finding]:
    """Return everything wrong with one rule as (field, text), in the order of contract 7.3."""
    return list(_problems(rule))


# Every change judges all stored rules again, of which all but a few were judged before.
@lru_cache(maxsize=MAX_RULES_STORED)
def _problems(rule: Rule) -> tuple[Finding, ...]:
    destination: Destination | None = None
    found: list[Finding] = []
    try:
        destination = parse_destination(rule.dst.strip())
    except DestinationError as problem:
        found.append(("dst", str(problem)))
    proto = normalise_proto(rule.proto)
    found += _ports(rule, proto, destination)
    if proto not in PROTOCOLS:
        found.append(("proto", f'"{rule.proto}" is not one of https, http, ws, wss, tcp, ssh, udp'))
    found += _words(rule)
    for entry in rule.path_rules:
        found += _path_entry(entry.path, entry.action, entry.methods)
    if len(rule.path_rules) > MAX_ENTRIES:
        found.append(("path_rules", f"has {len(rule.path_rules)} entries, at most {MAX_ENTRIES} are allowed"))
    found += _protocol_fit(normalise(rule), destination)
    found += _ours(rule)
    return tuple(found)


def rule_warnings(rule: Rule) -> tuple[Finding, ...]:
    """Return what is allowed but probably not meant."""
    return tuple(_warnings(rule))


def _warnings(rule: Rule) -> Iterator[Finding]:
    try:
        destination = parse_destination(rule.dst.strip())
    except DestinationError:
        return
    if destination.kind is Kind.NAME and destination.wildcard and destination.labels == 1:
        yield "dst", f'is the wildcard of a whole top-level domain, ".{destination.base}"'
    if normalise_proto(rule.proto) in PROTOCOLS - HTTP_FAMILY and _reads_http(rule):
        yield "proto", f"{rule.proto} has no paths: path rules, path default and the insecure flag are ignored"


def _reads_http(rule: Rule) -> bool:
    return bool(rule.path_rules or rule.path_default.strip() or rule.insecure_skip_tls_verify)


def _ports(rule: Rule, proto: str, destination: Destination | None) -> Iterator[Finding]:
    try:
        ports = parse_ports(rule.port)
    except PortError as problem:
        yield "port", f'"{rule.port}" {problem}'
        return
    if ports is None or ports[0] == ports[1]:
        return
    width = ports[1] - ports[0] + 1
    if proto in HTTP_FAMILY:
        yield "port", f'"{rule.port}" is a range, {proto} takes one port per rule'
    elif destination is not None and destination.kind is not Kind.CIDR:
        limit = MAX_RANGE_WILDCARD if destination.wildcard else MAX_RANGE_NAME
        if width > limit:
            what = "a wildcard name" if destination.wildcard else "one destination"
            yield "port", f'"{rule.port}" is {width} ports wide, at most {limit} are allowed on {what}'


def _words(rule: Rule) -> Iterator[Finding]:
    for field, text in (("action", rule.action), ("path_default", rule.path_default)):
        if text.strip().lower() not in _DECISIONS:
            yield field, f'"{text}" is neither allow nor deny'
    if rule.tls.strip().lower() not in _TLS_MODES:
        yield "tls", f'"{rule.tls}" is not one of auto, inspect, passthrough'


def _path_entry(path: str, action: str, methods: Iterable[str]) -> Iterator[Finding]:
    problem = path_problem(path.strip())
    if problem:
        yield "path", problem
    if action.strip().lower() not in _DECISIONS:
        yield "path action", f'"{action}" of {path} is neither allow nor deny'
    for method in methods:
        trimmed = method.strip()
        if trimmed and _METHOD.fullmatch(trimmed) is None:
            yield "method", f'"{method}" of {path} is not a method name'


def _protocol_fit(rule: Rule, destination: Destination | None) -> Iterator[Finding]:
    """Point 8 and 9: fields that do not go with the protocol or the kind of destination."""
    if rule.proto not in PROTOCOLS:
        return
    if rule.tls in ("inspect", "passthrough") and rule.proto != "https":
        why = "wss is always inspected" if rule.proto == "wss" else "it is for https only"
        yield "tls", f'"{rule.tls}" does not go with {rule.proto}: {why}'
    if rule.insecure_skip_tls_verify and rule.proto in ("http", "ws"):
        yield "insecure_skip_tls_verify", f"is for https and wss only, {rule.proto} has no TLS"
    if rule.tls == "passthrough" and _reads_http(rule):
        yield "tls", '"passthrough" is never read: no path rules, path default or insecure flag with it'
    if destination is not None and destination.kind is Kind.CIDR and rule.is_http:
        yield from _network_fit(rule)


def _network_fit(rule: Rule) -> Iterator[Finding]:
    if rule.proto in ("ws", "wss"):
        yield "proto", f"{rule.proto} needs a name or one address: a network is let through unread"
    unread = "a network is let through unread, write the rule for a name or one address"
    if rule.path_rules:
        yield "path_rules", f"cannot hold: {unread}"
    if rule.path_default == DENY:
        yield "path_default", f'"deny" cannot hold: {unread}'
    if rule.insecure_skip_tls_verify:
        yield "insecure_skip_tls_verify", f"cannot hold: {unread}"
    if rule.tls == "inspect":
        yield "tls", f'"inspect" cannot hold: {unread}'


def _ours(rule: Rule) -> Iterator[Finding]:
    if len(rule.comment) > MAX_COMMENT:
        yield "comment", f"is longer than {MAX_COMMENT} characters"
    if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in rule.comment):
        yield "comment", "has control characters"
    if not valid_scope(rule.scope or "global"):
        yield "scope", f'"{rule.scope}" is not global, project:<p> or agent:<p>/<a>'
    if rule.expires_at < 0:
        yield "expires_at", "is before 1970"
