"""
The rule shorthand of the command line (R36) and its reverse.

    [METHOD[,METHOD] ][proto://]dst[:port[-port]][/path]

Turns text into `Rule`s and back; whether such a rule may exist is `validate.py`'s business.
Every refusal quotes the part that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.destinations import Kind, parse_destination
from clawker_cp.firewall.ports import PROTOCOLS, WRITTEN_DEFAULT
from clawker_cp.firewall.rules import ALLOW, DENY, GLOBAL, PathRule, Rule, normalise, union_paths
from clawker_cp.firewall.validate import validate

ANY_PATH = "/"

# Upper case only: "api example.com" is a slip, not the method "API".
_METHODS = re.compile(r"([A-Z][A-Z-]*(?:,[A-Z][A-Z-]*)*) +(?=\S)")
_PROTO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_V4_NETWORK = re.compile(r"(\d{1,3}(?:\.\d{1,3}){3}/\d+)(?::([^/]*))?")
_V6 = re.compile(r"\[([^\[\]]*)\](/\d+)?(?::([^/~]*))?")
_NAME = re.compile(r"([^:/~\[\]]*)(?::([^/~]*))?")


@dataclass(frozen=True, slots=True)
class _Parts:
    methods: tuple[str, ...]
    proto: str
    dst: str
    port: str
    path: str


def _refuse(text: str, part: str, why: str) -> InvalidInput:
    return InvalidInput(
        f'"{part}" in the rule "{text}" {why}',
        code="RULE_INVALID",
        hint="a rule reads [METHOD[,METHOD] ][proto://]dst[:port[-port]][/path], see docs/rules.md",
    )


def _split(text: str) -> _Parts:
    rest = text.strip()
    if not rest:
        raise _refuse(text, "", "is empty")
    methods: tuple[str, ...] = ()
    found = _METHODS.match(rest)
    if found:
        methods, rest = tuple(found[1].split(",")), rest[found.end() :]
    if any(character.isspace() for character in rest):
        raise _refuse(text, rest, "has a space where none belongs")
    proto = "https"
    found = _PROTO.match(rest)
    if found:
        proto, rest = found[1].lower(), rest[found.end() :]
        proto = "https" if proto == "tls" else proto
        if proto not in PROTOCOLS:
            raise _refuse(text, found[1], "is not a protocol: https, http, ws, wss, tcp, ssh, udp")
    dst, port, path = _authority(text, rest)
    if port is not None and not port:
        raise _refuse(text, rest, "has a colon without a port")
    return _Parts(methods, proto, dst, port or "", path)


def _authority(text: str, rest: str) -> tuple[str, str | None, str]:
    """Split what follows the protocol into destination, port (None = no colon) and path."""
    found = _V4_NETWORK.fullmatch(rest)
    if found:
        return _strict_network(text, found[1]), found[2], ""
    found = _V6.match(rest)
    if found:
        inner = found[1] + (found[2] or "")
        dst = _strict_network(text, inner) if "/" in inner else inner
        if ":" not in dst:
            raise _refuse(text, f"[{found[1]}]", "is not an IPv6 address")
    else:
        if rest.partition("/")[0].count(":") > 1:
            raise _refuse(text, rest, "is an IPv6 address without [ ]")
        found = _NAME.match(rest)
        if found is None or not found[1]:
            raise _refuse(text, rest, "does not begin with a name or an address")
        dst = found[1]
        if dst.startswith("*."):
            dst = dst[1:]
    path = rest[found.end() :]
    if path and path[0] not in "/~":
        raise _refuse(text, rest, "has something after the port")
    return dst, found[found.re.groups], path


def _strict_network(text: str, network: str) -> str:
    found = parse_destination(network) if not network.startswith(".") else None
    if found is None or found.kind is not Kind.CIDR or found.network is None:
        raise _refuse(text, network, "is not a network")
    address = network.partition("/")[0]
    if parse_destination(address).base != str(found.network.network_address):
        raise _refuse(text, network, f"has host bits set: write {found.base} for the network")
    return network


def _rule(text: str, action: str, scope: str) -> Rule:
    """Parse without judging deny-of-a-path; the path entry, if any, carries `action`."""
    try:
        parts = _split(text)
    except ValueError as error:
        if isinstance(error, InvalidInput):
            raise
        raise _refuse(text, text, str(error)) from error
    if parts.methods and parts.proto not in ("https", "http", "ws", "wss"):
        raise _refuse(text, ",".join(parts.methods), f"is a method, {parts.proto} has none")
    if parts.path and parts.proto not in ("https", "http", "ws", "wss"):
        raise _refuse(text, parts.path, f"is a path, {parts.proto} has none")
    entries: tuple[PathRule, ...] = ()
    if parts.path or parts.methods:
        entries = (PathRule(parts.path or ANY_PATH, action, parts.methods),)
    rule = Rule(parts.dst, parts.proto, parts.port, action, entries, scope=scope)
    problems = validate([rule]).problems
    if problems:
        quoted = {"dst": parts.dst, "port": parts.port, "path": parts.path}.get(problems[0].field, parts.dst)
        raise _refuse(text, quoted, f"is no good: {problems[0].field} {problems[0].text}")
    return normalise(rule)


def parse_rule_shorthand(text: str, action: str = ALLOW, *, scope: str = GLOBAL) -> Rule:
    """
    Parse one shorthand into a normalised rule.

    A deny of a path or method alone becomes a rule that allows nothing either (`path_default:
    deny`), so that it never opens a name by itself; use `parse_shorthands` to lay denied paths
    over allowed names. Raises `InvalidInput` (`RULE_INVALID`) that quotes the wrong part.
    """
    rule = _rule(text, action, scope)
    if action == DENY and rule.path_rules:
        return replace(rule, action=ALLOW, path_default=DENY)
    return rule


def parse_shorthands(allow: Iterable[str], deny: Iterable[str], *, scope: str = GLOBAL) -> tuple[Rule, ...]:
    """
    Parse all `--allow` and `--deny` of one command line into rules, one per (key, action).

    Allowed paths of one destination add up; a whole destination allowed beside paths of it is
    allowed as a whole. A denied path is laid over the allow that decides for that destination (for
    a name below an allowed wildcard: over a copy of that allow). Raises `InvalidInput`.
    """
    rules: dict[tuple[str, str], Rule] = {}
    whole: set[str] = set()
    for text in allow:
        rule = _rule(text, ALLOW, scope)
        if not rule.path_rules:
            whole.add(rule.key)
        present = rules.get((rule.key, ALLOW))
        rules[rule.key, ALLOW] = _allow_both(present, rule) if present else rule
    for (key, action), rule in rules.items():
        if key in whole and rule.path_rules:
            rules[key, action] = replace(rule, path_default=ALLOW)
    for text in deny:
        rule = _rule(text, DENY, scope)
        if rule.path_rules:
            decider = _decider(list(rules.values()), rule)
            if decider is None:
                raise _refuse(text, rule.dst, "is not allowed by any other rule, so there is no path of it to deny")
            copied = replace(decider, dst=rule.dst)
            # An entry that denies never changes the effective default, so the copy keeps it.
            rules[copied.key, ALLOW] = replace(copied, path_rules=_deny_over(decider, rule))
        else:
            rules[rule.key, DENY] = rule
    return tuple(rules.values())


def _allow_both(first: Rule, second: Rule) -> Rule:
    """Join two allows of one key: the same path for other methods adds methods, not replaces them."""
    entries = {entry.path: entry for entry in first.path_rules}
    for entry in second.path_rules:
        present = entries.get(entry.path)
        if present is not None:
            both = () if not (present.methods and entry.methods) else (*present.methods, *entry.methods)
            entry = replace(entry, methods=tuple(sorted(set(both))))
        entries[entry.path] = entry
    return replace(first, path_rules=tuple(entries.values()))


def _deny_over(decider: Rule, denied: Rule) -> tuple[PathRule, ...]:
    """Lay denied entries over allowed ones; an entry of the same path keeps the methods that are left."""
    entry = denied.path_rules[0]
    present = next((one for one in decider.path_rules if one.path == entry.path), None)
    if present is None or not entry.methods or present.action == DENY:
        return union_paths(decider.path_rules, (entry,))
    if present.methods:
        left = tuple(method for method in present.methods if method not in entry.methods)
        kept = replace(present, methods=left) if left else entry
        return union_paths(decider.path_rules, (kept,))
    raise _refuse(
        denied.dst, entry.path, f"is allowed for every method, so {','.join(entry.methods)} alone cannot be taken away"
    )


def _decider(rules: Sequence[Rule], denied: Rule) -> Rule | None:
    """Return the allow that decides for the destination of a denied path."""
    wanted = parse_destination(denied.dst)
    best: tuple[int, Rule] | None = None
    for rule in rules:
        if rule.is_deny or (rule.proto, rule.port) != (denied.proto, denied.port):
            continue
        have = parse_destination(rule.dst)
        equal = have == wanted
        below = have.wildcard and (wanted.base == have.base or wanted.base.endswith("." + have.base))
        if not (equal or (below and wanted.kind is Kind.NAME and (not wanted.wildcard or have.base != wanted.base))):
            continue
        rank = have.labels * 2 + (not have.wildcard)
        if best is None or rank > best[0]:
            best = (rank, rule)
    return best[1] if best else None


def _authority_text(rule: Rule) -> str:
    destination = parse_destination(rule.dst)
    dst = rule.dst
    if destination.kind is not Kind.NAME and ":" in dst:
        address, slash, length = dst.partition("/")
        dst = f"[{address}]{slash}{length}"
    elif destination.wildcard:
        dst = "*" + dst
    port = rule.port
    explicit = port and port != WRITTEN_DEFAULT.get(rule.proto)
    # An address followed by a path that begins with a digit would read as a network.
    digits = destination.kind is Kind.ADDRESS and any(e.path[1:2].isdigit() for e in rule.path_rules)
    return f"{dst}:{port}" if explicit or digits else dst


def format_shorthands(rule: Rule) -> tuple[str, ...]:
    """
    Write a normalised rule as shorthands, one per path entry of the rule's own action.

    What the shorthand has no words for is left out: flags, TLS mode, comments, expiry, and entries
    against the rule's action.
    """
    head = f"{rule.proto}://{_authority_text(rule)}"
    own = [entry for entry in rule.path_rules if entry.action == rule.action]
    texts = []
    for entry in own:
        methods = ",".join(entry.methods)
        path = "" if methods and entry.path == ANY_PATH else entry.path
        texts.append(f"{methods} {head}{path}" if methods else f"{head}{path}")
    if not own or (rule.path_default == ALLOW and not rule.is_deny):
        texts.append(head)
    return tuple(texts)


def format_shorthand(rule: Rule) -> str:
    """Write a normalised rule as its first shorthand."""
    return format_shorthands(rule)[0]


def shorthand_for(host: str, proto: str, port: int, path: str = "", method: str = "") -> str:
    """Write the shorthand that would allow one refused request or connection."""
    entries = (PathRule(path or ANY_PATH, ALLOW, (method.upper(),) if method else ()),) if path or method else ()
    return format_shorthand(normalise(Rule(host, proto, str(port), ALLOW, entries)))
