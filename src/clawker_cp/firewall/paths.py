"""
Path entries of HTTP rules (contract 7.7): canonical form, order, effective default, judgement.

The proxy enforces the same three steps in its routes; this is the reference that `check`
answers from, so both are tested against one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import re2

from clawker_cp.firewall.plan import PathEntry, PathPolicy
from clawker_cp.firewall.rules import ALLOW, PathRule

MAX_PATTERN_BYTES = 1024
MAX_ENTRIES = 256

REGEX_MARK = "~"

# Escapes that another parser may decode into something that changes the path's meaning.
_ESCAPES = re.compile(r"%(?:2e|2f|5c|00|252e|252f|255c)", re.IGNORECASE)
_LITERAL = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@/%-]*")


def escapes(path: str) -> bool:
    """Whether the text has a sequence that no canonical path has, dot segments apart."""
    return _ESCAPES.search(path) is not None or "\\" in path or "//" in path


def is_canonical(path: str, *, semicolon: bool) -> bool:
    """
    Whether a request path (without query) may be judged at all.

    `semicolon`: the origin has a pattern with a `;`, so the path may have one too.
    """
    if escapes(path) or (not semicolon and ";" in path):
        return False
    return not any(segment in (".", "..") for segment in path.split("/"))


def path_problem(path: str) -> str:
    """Say what is wrong with a path pattern, "" if nothing is."""
    if not path:
        return "is empty"
    if len(path.encode()) > MAX_PATTERN_BYTES:
        return f"is longer than {MAX_PATTERN_BYTES} bytes"
    if path.startswith(REGEX_MARK):
        return _regex_problem(path[1:])
    if not path.startswith("/"):
        return f'"{path}" does not begin with /'
    if _LITERAL.fullmatch(path) is None:
        return f'"{path}" has characters other than A-Z a-z 0-9 . _ ~ ! $ & \' ( ) * + , ; = : @ / % -'
    # The last segment is an open prefix: "/." matches "/.well-known".
    if escapes(path) or any(segment in (".", "..") for segment in path.split("/")[:-1]):
        return f'"{path}" is not in canonical form and could never match'
    return ""


def _regex_problem(expression: str) -> str:
    if not expression.removeprefix("^").startswith("/"):
        return f'"~{expression}" is a regular expression that does not begin with /'
    try:
        compile_pattern(expression)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        return f'"~{expression}" is not an RE2: {text}'
    return ""


def compile_pattern(expression: str) -> Any:
    """Compile an RE2 without its `~`; raises `re2.error`."""
    options = re2.Options()
    options.log_errors = False
    return re2.compile(expression, options)  # re2 keeps a cache of its own


def effective_default(path_default: str, entries: Iterable[PathRule]) -> bool:
    """Whether a request that no entry names is allowed (contract 7.7)."""
    if path_default:
        return path_default == ALLOW
    return not any(entry.action == ALLOW for entry in entries)


def ordered(entries: Iterable[PathRule]) -> tuple[PathEntry, ...]:
    """Put entries in the order they are tried: longest pattern, deny first, stored order."""
    ranked = sorted(entries, key=lambda entry: (-len(entry.path), entry.action == ALLOW))
    return tuple(PathEntry(entry.path, entry.action == ALLOW, entry.methods) for entry in ranked)


@dataclass(frozen=True, slots=True)
class PathVerdict:
    """How one request fares; `entry` is the pattern that decided, "" = the default."""

    allowed: bool
    reason: str  # "forwarded", "rule_deny", "path_denied", "path_not_canonical"
    entry: str = ""
    other_method: bool = False  # an entry matched the path for other methods only


def judge(policy: PathPolicy, method: str, path: str) -> PathVerdict:
    """Judge one request against the entries of an origin; `path` may still have its query."""
    if policy.denied:
        return PathVerdict(False, "rule_deny")
    if not policy.reads_paths:
        return PathVerdict(True, "forwarded")
    path = path.partition("?")[0]
    semicolon = any(";" in entry.pattern for entry in policy.entries)
    if not is_canonical(path, semicolon=semicolon):
        return PathVerdict(False, "path_not_canonical")
    other_method = False
    for entry in policy.entries:
        if not matches(entry.pattern, path):
            continue
        if entry.methods and method.upper() not in entry.methods:
            other_method = True
            continue
        return PathVerdict(entry.allow, "forwarded" if entry.allow else "path_denied", entry.pattern)
    allowed = policy.default_allow
    return PathVerdict(allowed, "forwarded" if allowed else "path_denied", "", other_method)


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern covers a path: open prefix, or the RE2 on the whole path."""
    if pattern.startswith(REGEX_MARK):
        return compile_pattern(pattern[1:]).fullmatch(path) is not None
    return path.startswith(pattern)
