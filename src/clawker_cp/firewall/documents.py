"""
Rules as documents: the mapping form of contract 7.1, shared by YAML and JSON.

Reads with every problem reported at once, writes fields in the schema's order. Files, locks and
comments are `store.py`'s business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from clawker_cp.errors import READERS_RAISE, InvalidInput
from clawker_cp.firewall.rules import GLOBAL, PathRule, Problem, Rule, RuleInvalid
from clawker_cp.firewall.validate import validate

MAX_DOCUMENT_BYTES = 16 * 1024 * 1024

FIELDS = (
    "dst",
    "proto",
    "port",
    "action",
    "path_rules",
    "path_default",
    "insecure_skip_tls_verify",
    "tls",
    "allow_private",
    "comment",
    "source",
    "created_at",
    "scope",
    "expires_at",
)
PATH_FIELDS = ("path", "action", "methods")

# Scalars that YAML reads as the same text unquoted; anything else is quoted.
_PLAIN = re.compile(r"\.?[a-z][a-z0-9-]*(?:\.[a-z0-9_-]+)+|allow|deny|inspect|passthrough|auto|https?|wss?|tcp|ssh|udp")
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Reading:
    """One item of a document: the rule if its shape allows one, and what is wrong with its shape."""

    rule: Rule | None
    problems: tuple[tuple[str, str], ...]
    dst: str
    denies: bool


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain values; raises `InvalidInput` with line and column."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, *READERS_RAISE) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InvalidInput(f"not YAML: {problem}{where}", code="RULE_INVALID") from error


def rule_items(document: Any) -> list[Any]:
    """Return the items of a document `rules: [...]`; raises `InvalidInput` if its shape is another."""
    if document is None:
        return []
    if not isinstance(document, Mapping):
        raise InvalidInput('the file has to be a mapping with the key "rules"', code="RULE_INVALID")
    items = document.get("rules")
    if items is None:
        return []
    if not isinstance(items, list):
        raise InvalidInput('"rules" has to be a list', code="RULE_INVALID")
    return items


class _Fields:
    """Takes typed fields out of a mapping and notes what does not fit."""

    def __init__(self, item: Mapping[Any, Any], prefix: str = "") -> None:
        self._item = item
        self._prefix = prefix
        self.problems: list[tuple[str, str]] = []

    def _wrong(self, key: str, what: str, value: object) -> None:
        self.problems.append((self._prefix + key, f"has to be {what}, is {_kind(value)}"))

    def text(self, key: str, *, number: bool = False) -> str:
        value = self._item.get(key)
        if value is None:
            return ""
        if number and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str):
            if not _SURROGATE.search(value):
                return value
            self.problems.append((self._prefix + key, "holds half a character (\\ud800 to \\udfff)"))
            return ""
        self._wrong(key, "text" + (" or a number" if number else ""), value)
        return ""

    def flag(self, key: str) -> bool | None:
        value = self._item.get(key)
        if value is None or isinstance(value, bool):
            return value
        self._wrong(key, "true or false", value)
        return None

    def listed(self, key: str) -> list[Any]:
        value = self._item.get(key)
        if value is None:
            return []
        if isinstance(value, list):
            return value
        self._wrong(key, "a list", value)
        return []

    def time(self, key: str) -> float:
        value = self._item.get(key)
        if value is None or value == "":
            return 0.0
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                self._wrong(key, "a time like 2026-05-01T12:00:00Z", value)
                return 0.0
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        self._wrong(key, "a time like 2026-05-01T12:00:00Z", value)
        return 0.0

    def unknown(self, known: tuple[str, ...]) -> None:
        for key in self._item:
            if key not in known:
                self.problems.append((f"{self._prefix}{key}", f"is not a field; the fields are {', '.join(known)}"))


def _kind(value: object) -> str:
    # Only of what is short to say: aliases make a list of a few lines that takes gigabytes to write out.
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int):
        return f'"{value}"' if isinstance(value, str) else str(value)
    kinds: dict[type[Any], str] = {dict: "a mapping", list: "a list"}
    return kinds.get(type(value), type(value).__name__)


def read_item(item: Any, *, strict: bool, scope: str = GLOBAL) -> Reading:
    """
    Read one item; `strict` also refuses unknown keys. `scope` holds where the item names none.

    Only shapes are judged here, values by `validate.py`.
    """
    if not isinstance(item, Mapping):
        return Reading(None, (("rule", f"has to be a mapping, is {_kind(item)}"),), "", denies=False)
    fields = _Fields(item)
    paths: list[PathRule] = []
    for position, entry in enumerate(fields.listed("path_rules")):
        prefix = f"path_rules[{position}]"
        if not isinstance(entry, Mapping):
            fields.problems.append((prefix, f"has to be a mapping, is {_kind(entry)}"))
            continue
        inner = _Fields(entry, prefix + ".")
        methods = inner.listed("methods")
        if not all(isinstance(method, str) for method in methods):
            inner.problems.append((f"{prefix}.methods", "has to be a list of texts"))
            methods = []
        if strict:
            inner.unknown(PATH_FIELDS)
        paths.append(PathRule(inner.text("path"), inner.text("action"), tuple(methods)))
        fields.problems += inner.problems
    rule = Rule(
        dst=fields.text("dst"),
        proto=fields.text("proto"),
        port=fields.text("port", number=True),
        action=fields.text("action"),
        path_rules=tuple(paths),
        path_default=fields.text("path_default"),
        insecure_skip_tls_verify=bool(fields.flag("insecure_skip_tls_verify")),
        tls=fields.text("tls"),
        allow_private=fields.flag("allow_private"),
        comment=fields.text("comment"),
        source=fields.text("source"),
        created_at=int(fields.time("created_at")),
        scope=fields.text("scope") or scope,
        expires_at=fields.time("expires_at"),
    )
    if strict:
        fields.unknown(FIELDS)
    denies = str(item.get("action", "")).strip().lower() == "deny"
    return Reading(rule if not fields.problems else None, tuple(fields.problems), rule.dst, denies)


def read_rules(text: str, *, scope: str = GLOBAL) -> tuple[Rule, ...]:
    """
    Read a whole rules document strictly, as a user hands it in (R37).

    Returns normalised rules. Raises `InvalidInput`, or `RuleInvalid` with every problem.
    """
    document = parse_yaml(text)
    items = rule_items(document)
    problems = [
        Problem(-1, "", str(key), 'is not a key of a rules file; its only key is "rules"')
        for key in document or ()
        if key != "rules"
    ]
    readings = [read_item(item, strict=True, scope=scope) for item in items]
    for index, reading in enumerate(readings):
        problems += (Problem(index, reading.dst, field, what) for field, what in reading.problems)
    sound = {index: reading.rule for index, reading in enumerate(readings) if reading.rule is not None}
    validation = validate(list(sound.values()))
    positions = list(sound)
    problems += (
        Problem(positions[p.index] if p.index < len(positions) else p.index, p.dst, p.field, p.text, p.code, p.limit)
        for p in validation.problems
    )
    if problems:
        raise RuleInvalid(sorted(problems, key=lambda problem: problem.index))
    return validation.rules


def read_rules_file(path: Path, *, scope: str = GLOBAL) -> tuple[Rule, ...]:
    """Read a user's rules file; raises `InvalidInput` naming the file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)  # a device may have no end
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InvalidInput(f"the rules file {path} is larger than {MAX_DOCUMENT_BYTES} bytes")
        text = data.decode()
    except OSError as error:
        raise InvalidInput(f"the rules file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the rules file {path} is not UTF-8 text") from error
    try:
        return read_rules(text, scope=scope)
    except RuleInvalid:  # names its rules
        raise
    except InvalidInput as error:
        raise InvalidInput(f"the rules file {path}: {error.message}", code=error.code) from error


def format_time(seconds: float) -> str:
    """Write Unix seconds as RFC 3339 in UTC, to the second unless there is a fraction."""
    moment = datetime.fromtimestamp(seconds, UTC)
    spec = "seconds" if moment.microsecond == 0 else "microseconds"
    return moment.isoformat(timespec=spec).replace("+00:00", "Z")


def to_mapping(rule: Rule) -> dict[str, Any]:
    """Return a normalised rule as a document item: schema order, nothing that is a default."""
    item: dict[str, Any] = {"dst": rule.dst, "proto": rule.proto}
    if rule.port:
        item["port"] = rule.port
    item["action"] = rule.action
    if rule.path_rules:
        item["path_rules"] = [_path_mapping(entry) for entry in rule.path_rules]
    if rule.path_default:
        item["path_default"] = rule.path_default
    if rule.insecure_skip_tls_verify:
        item["insecure_skip_tls_verify"] = True
    if rule.tls not in ("", "auto"):
        item["tls"] = rule.tls
    if rule.allow_private is not None:
        item["allow_private"] = rule.allow_private
    if rule.comment:
        item["comment"] = rule.comment
    if rule.source:
        item["source"] = rule.source
    if rule.created_at:
        item["created_at"] = format_time(rule.created_at)
    if rule.scope != GLOBAL:
        item["scope"] = rule.scope
    if rule.expires_at:
        item["expires_at"] = format_time(rule.expires_at)
    return item


def _path_mapping(entry: PathRule) -> dict[str, Any]:
    item: dict[str, Any] = {"path": entry.path, "action": entry.action}
    if entry.methods:
        item["methods"] = list(entry.methods)
    return item


def scalar(value: object) -> str:
    """Write one YAML scalar."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    # JSON is YAML but for characters that YAML takes for line breaks or refuses raw.
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)


def emit_item(rule: Rule) -> str:
    """Write a rule as one block item of `rules:`, two spaces in, ending in a newline."""
    lines: list[str] = []
    for key, value in to_mapping(rule).items():
        if key == "path_rules":
            lines.append("path_rules:")
            for entry in value:
                lines.append(f"  - path: {scalar(entry['path'])}")
                lines.append(f"    action: {scalar(entry['action'])}")
                if "methods" in entry:
                    lines.append(f"    methods: [{', '.join(scalar(method) for method in entry['methods'])}]")
        else:
            lines.append(f"{key}: {scalar(value)}")
    return "".join(f"  {'- ' if number == 0 else '  '}{line}\n" for number, line in enumerate(lines))


def emit_rules(rules: tuple[Rule, ...] | list[Rule]) -> str:
    """Write a whole rules document."""
    return "rules:\n" + "".join(emit_item(rule) for rule in rules) if rules else "rules: []\n"
