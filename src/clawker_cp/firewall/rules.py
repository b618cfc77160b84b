"""
The rule as users write it (contract 7.1) and its identity (7.4).

Values only: `validate.py` judges them, `store.py` keeps them, `compile.py` turns them into a
plan. Every field keeps the spelling of the YAML schema.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.destinations import stored_destination
from clawker_cp.firewall.ports import HTTP_FAMILY, WRITTEN_DEFAULT
from clawker_cp.runtime.agent_names import NAME

GLOBAL = "global"

# Action, path default.
ALLOW = "allow"
DENY = "deny"

# A rule that was not understood but denies: every port and protocol of its dst (contract 7.9).
# Never read from users or files; only `salvage.py` makes it.
PROTO_ANY = "any"

# Every change normalises all stored rules (at most as many as this) again.
_REMEMBERED = 20_000

_SCOPE = re.compile(rf"global|project:{NAME}|agent:(?:{NAME})?/{NAME}")


@dataclass(frozen=True, slots=True)
class PathRule:
    """One path entry: a literal prefix, or `~` and an RE2 that has to match the whole path."""

    path: str
    action: str = ""
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """
    One egress rule.

    `allow_private` None means "not said" (deciding: False). `expires_at` is Unix seconds, 0 =
    never; `created_at` likewise, 0 = unknown. `scope` is contract 1.2's.
    """

    dst: str
    proto: str = ""
    port: str = ""
    action: str = ""
    path_rules: tuple[PathRule, ...] = ()
    path_default: str = ""
    insecure_skip_tls_verify: bool = False
    tls: str = ""
    allow_private: bool | None = None
    comment: str = ""
    source: str = ""
    created_at: int = 0
    scope: str = GLOBAL
    expires_at: float = 0.0

    @property
    def key(self) -> str:
        """`dst:proto:port` of the normalised rule; what adding and removing go by."""
        return f"{self.dst}:{self.proto}:{self.port}"

    @property
    def id(self) -> str:
        """`r-` and 12 hex digits over scope, key and action of the normalised rule."""
        return rule_id(self.scope, self.key, self.action)

    @property
    def is_deny(self) -> bool:
        """Whether the rule denies."""
        return self.action == DENY

    @property
    def is_http(self) -> bool:
        """Whether the proxy reads requests of it: https, http, ws, wss."""
        return self.proto in HTTP_FAMILY


@dataclass(frozen=True, slots=True)
class Problem:
    """
    One thing wrong with one rule of a request; `index` is its position there, -1 = no single rule.

    `code` is `RULE_INVALID`, or `CAPACITY` with the exhausted bound in `limit`.
    """

    index: int
    dst: str
    field: str
    text: str
    code: str = "RULE_INVALID"
    limit: str = ""

    def __str__(self) -> str:
        if self.index < 0:
            return f"{self.field} {self.text}"
        return f"rule {self.index} ({self.dst}): {self.field} {self.text}"


class RuleInvalid(InvalidInput):
    """One or more rules are refused; `problems` holds all of them."""

    code = "RULE_INVALID"

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0] if problems else None
        super().__init__(
            "; ".join(str(problem) for problem in problems) or "the rules are not valid",
            details={"index": str(first.index), "dst": first.dst, "problem": f"{first.field} {first.text}"}
            if first
            else {},
        )
        self.problems = tuple(problems)


@lru_cache(maxsize=65536)
def rule_id(scope: str, key: str, action: str) -> str:
    """Return the stable id of a rule (contract 7.4)."""
    return "r-" + hashlib.sha256(f"{scope}\n{key}\n{action}".encode()).hexdigest()[:12]


def normalise_proto(proto: str) -> str:
    """Lower-case a protocol; empty and `tls` mean https."""
    lowered = proto.strip().lower()
    return "https" if lowered in ("", "tls") else lowered


def normalise_port(proto: str, port: str) -> str:
    """Return the port as stored: trimmed, the protocol's default written out where it has one."""
    text = port.strip()
    if not text:
        return WRITTEN_DEFAULT.get(proto, "")
    first, dash, last = text.partition("-")
    text = f"{first.strip()}-{last.strip()}" if dash else text
    low, dash, high = text.partition("-")
    low, high = low.lstrip("0") or low, high.lstrip("0") or high
    return low if not dash or low == high else f"{low}-{high}"


def _normalise_path(entry: PathRule) -> PathRule:
    methods = tuple(sorted({method.strip().upper() for method in entry.methods if method.strip()}))
    return PathRule(entry.path.strip(), entry.action.strip().lower() or ALLOW, methods)


def union_paths(first: Sequence[PathRule], second: Sequence[PathRule]) -> tuple[PathRule, ...]:
    """Join path entries: one per path string, a later one replaces in place, new ones are appended."""
    joined = {entry.path: entry for entry in first}
    joined.update({entry.path: entry for entry in second})
    return tuple(joined.values())


def normalise(rule: Rule) -> Rule:
    """
    Return the rule as it is stored and compared (contract 7.4).

    Total: a rule that does not validate comes back with the bad field trimmed, not fixed.
    """
    return _normalised(rule)


@lru_cache(maxsize=_REMEMBERED)
def _normalised(rule: Rule) -> Rule:
    proto = normalise_proto(rule.proto)
    return replace(
        rule,
        dst=stored_destination(rule.dst.strip()),
        proto=proto,
        port=normalise_port(proto, rule.port),
        action=rule.action.strip().lower() or ALLOW,
        path_rules=union_paths((), [_normalise_path(entry) for entry in rule.path_rules]),
        path_default=rule.path_default.strip().lower(),
        tls=rule.tls.strip().lower() or "auto",
        scope=rule.scope or GLOBAL,
    )


def valid_scope(scope: str) -> bool:
    """Whether a scope is `global`, `project:<p>` or `agent:<p>/<a>` with well-formed names."""
    return _SCOPE.fullmatch(scope) is not None


def agent_scope(project: str, agent: str) -> str:
    """Return the scope of one agent; the project may be empty."""
    return f"agent:{project}/{agent}"


def scopes_of(agent_key: str) -> tuple[str, ...]:
    """Return the scopes that hold for an agent scope key, widest first."""
    project = agent_key.removeprefix("agent:").partition("/")[0]
    return (GLOBAL, f"project:{project}", agent_key) if project else (GLOBAL, agent_key)


def scope_order(scope: str) -> tuple[int, str]:
    """Sort key of scopes: global, projects by name, agents by name."""
    return (0 if scope == GLOBAL else 1 if scope.startswith("project:") else 2, scope)
