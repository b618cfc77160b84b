"""
Path entries of HTTP rules (contract 7.7): canonical form, order, effective default, judgement.

The proxy enforces the same three steps in its routes; this is the reference that `check`
answers from, so both are tested against one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import re2

from clawker_cp.firewall.plan import PathEntry, PathPolicy
from clawker_cp.firewall.rules import ALLOW, PathRule

MAX_PATTERN_BYTES = 1024
MAX_ENTRIES = 256

REGEX_MARK = "~"

# What no canonical path has, whatever the rule; all of it without case. In this order: escapes of
# characters that need none and of controls, `.` `/` `\` among them, also escaped more than once (an
# origin decodes `/%61dmin` to the `/admin` that a rule denies); bytes that no UTF-8 has (overlong
# forms); what looks like an escape and is none; separators that origins fold.
_NEVER = (
    r"%(?:25)*(?:[01][0-9a-f]|2[def]|3[0-9]|4[1-9a-f]|5[0-9acf]|6[1-9a-f]|7[0-9aef]|c[01]|f[5-9a-f])"
    r"|%(?:[^0-9a-f]|[0-9a-f](?:[^0-9a-f]|$)|$)"
    r"|\\|//"
)
_DOTS = r"/\.\.?(?:/|$)"
_ESCAPES = re.compile(_NEVER, re.IGNORECASE)
# Characters of a path that clients may escape or not; origins decode both.
_EITHER_WAY = "!$&'()*+,:;=@"
_LOWER_ESCAPE = re.compile("%(?:[a-f][0-9A-Fa-f]|[0-9A-Fa-f][a-f])")
_LITERAL = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@/%-]*")


def escapes(path: str) -> bool:
    """Whether the text has a sequence that no canonical path has, dot segments apart."""
    return _ESCAPES.search(path) is not None or "\\" in path or "//" in path


@lru_cache(maxsize=4096)
def refused_form(entries: tuple[PathEntry, ...]) -> str:
    """
    The RE2 of what a path (without query) may not contain to be judged by these entries.

    `;` unless a pattern has one. The escaped form of a character that a denying pattern has. Escapes
    in lower case where a pattern has an escape, for patterns are compared letter by letter.
    """
    patterns = [entry.pattern for entry in entries]
    parts = [f"(?i:{_NEVER}|{_DOTS})"]
    if not any(";" in pattern for pattern in patterns):
        parts.append("(?i:;|%3b)")
    denied = {letter for entry in entries if not entry.allow for letter in entry.pattern}
    either = "|".join(f"{ord(letter):02x}" for letter in _EITHER_WAY if letter in denied)
    if either:
        parts.append(f"(?i:%(?:25)*(?:{either}))")
    if any("%" in pattern for pattern in patterns):
        parts.append(_LOWER_ESCAPE.pattern)
    return "|".join(parts)


def is_canonical(path: str, entries: tuple[PathEntry, ...]) -> bool:
    """Whether a request path (without query) may be judged at all."""
    return compile_pattern(f"(?s).*(?:{refused_form(entries)}).*").fullmatch(path) is None


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
    if _LOWER_ESCAPE.search(path):
        return f'"{path}" has an escape in lower case and could never match: write %C3, not %c3'
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
    if not is_canonical(path, policy.entries):
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
