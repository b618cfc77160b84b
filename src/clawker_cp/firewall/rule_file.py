"""
One rules file as text that keeps everything it does not change.

The text is held as a head, one chunk per rule, and a tail; a change touches the chunks of the
rules concerned and nothing else, so comments, unknown keys and unreadable items survive byte
for byte. Documents of a shape that cannot be cut so are rewritten through a round-trip YAML
library instead. No I/O, no locks: `store.py` has those.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from clawker_cp.errors import READERS_RAISE, InvalidInput
from clawker_cp.firewall.documents import Reading, emit_item, emit_rules, read_item, rule_items, to_mapping
from clawker_cp.firewall.rules import GLOBAL, Rule, normalise

_DASH = re.compile(r" *- +\S")
# Anchors and aliases tie items together: such a file is not cut into chunks.
_ANCHOR = re.compile(r"(?:^|[\s\[{,:-])[&*][A-Za-z0-9_]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One item: its lines with the comments that follow it, and what was read from them."""

    text: str
    reading: Reading
    rule: Rule | None  # normalised


def _round_trip() -> YAML:
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _load(text: str) -> Any:
    try:
        return _round_trip().load(text)
    except (YAMLError, *READERS_RAISE) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InvalidInput(f"not YAML: {problem}{where}", code="RULE_INVALID") from error


class RuleFile:
    """The content of one rules file. Made by `parse`; `update` returns the text for a new set of rules."""

    def __init__(self, head: str, chunks: list[Chunk], tail: str, text: str, cuttable: bool) -> None:
        self._head = head
        self._tail = tail
        self._cuttable = cuttable
        self.chunks = chunks
        self.text = text

    @classmethod
    def parse(cls, text: str) -> RuleFile:
        """Read a file's text; raises `InvalidInput` if it is not YAML or not a list of rules."""
        document = _load(text)
        items = rule_items(document)
        if not items:
            cuttable = not text.strip() or text.strip() == "rules: []"
            return cls("rules:\n", [], "", text, cuttable)
        readings = [read_item(item, strict=False) for item in items]
        rules = [normalise(one.rule) if one.rule is not None else None for one in readings]
        cut = _cut(text, document["rules"]) if not _ANCHOR.search(text) else None
        if cut is None:
            chunks = [Chunk("", reading, rule) for reading, rule in zip(readings, rules, strict=True)]
            return cls("", chunks, "", text, cuttable=False)
        head, texts, tail = cut
        chunks = [Chunk(*parts) for parts in zip(texts, readings, rules, strict=True)]
        return cls(head, chunks, tail, text, cuttable=True)

    @property
    def rules(self) -> list[Rule]:
        """The rules that could be read, normalised, not judged."""
        return [chunk.rule for chunk in self.chunks if chunk.rule is not None]

    def update(self, wanted: Sequence[Rule], kept: frozenset[int] = frozenset()) -> RuleFile:
        """
        Return the file with exactly these rules, in this order for new ones.

        `kept` are positions of chunks that stay whatever `wanted` says: items that could not be
        read or do not hold. Chunks of unchanged rules keep their text.
        """
        if not self._cuttable:
            return RuleFile.parse(self._rewrite(wanted, kept))
        left = {_place(rule): rule for rule in wanted}
        chunks: list[Chunk] = []
        head = self._head
        for position, chunk in enumerate(self.chunks):
            if position in kept or chunk.rule is None:
                chunks.append(chunk)
                continue
            rule = left.pop(_place(chunk.rule), None) or left.pop(_other_place(chunk.rule), None)
            if rule is None:
                orphan = _trailing(chunk.text)
                if chunks:
                    chunks[-1] = replace(chunks[-1], text=chunks[-1].text + orphan)
                else:
                    head += orphan
            else:
                chunks.append(chunk if rule == chunk.rule else _changed(chunk, rule))
        column = next((one.text.index("-") for one in self.chunks), 2)
        chunks += [_new(rule, column) for rule in left.values()]
        if chunks and not head.endswith("\n"):
            head += "\n"
        ended = [chunk.text.endswith("\n") for chunk in chunks]
        chunks = [one if end else replace(one, text=one.text + "\n") for one, end in zip(chunks, ended, strict=True)]
        text = head + "".join(chunk.text for chunk in chunks) + self._tail
        if not chunks:
            text = _emptied(head) + self._tail
        return RuleFile(head, chunks, self._tail, text, cuttable=bool(chunks) or text == emit_rules(()))

    def _rewrite(self, wanted: Sequence[Rule], kept: frozenset[int]) -> str:
        """Write through the round-trip library: slower, and keeps comments where they hang on kept nodes."""
        document = _load(self.text)
        if not isinstance(document, CommentedMap):
            document = CommentedMap()
        items = document.get("rules") or CommentedSeq()
        left = {_place(rule): rule for rule in wanted}
        for position in reversed(range(len(self.chunks))):
            chunk = self.chunks[position]
            if position in kept or chunk.rule is None:
                continue
            rule = left.pop(_place(chunk.rule), None) or left.pop(_other_place(chunk.rule), None)
            if rule is None:
                del items[position]
            elif rule != chunk.rule:
                _lay_over(items[position], rule)
        for rule in left.values():
            items.append(_lay_over(CommentedMap(), rule))
        document["rules"] = items
        stream = io.StringIO()
        _round_trip().dump(document, stream)
        return stream.getvalue()


_Place = tuple[str, str, str, bool]


def _place(rule: Rule) -> _Place:
    return (rule.scope, rule.key, rule.action, bool(rule.expires_at))


def _other_place(rule: Rule) -> _Place:
    """Where a rule is found whose action was turned round."""
    return (rule.scope, rule.key, "allow" if rule.is_deny else "deny", bool(rule.expires_at))


def _cut(text: str, items: CommentedSeq) -> tuple[str, list[str], str] | None:
    """Cut block-style text at its items' dashes; None if it is not laid out that way."""
    if items.fa.flow_style():
        return None
    lines = text.splitlines(keepends=True)
    starts = [items.lc.item(position)[0] for position in range(len(items))]
    if sorted(set(starts)) != starts or not all(_DASH.match(lines[start]) for start in starts):
        return None
    column = lines[starts[0]].index("-")
    if any(lines[start].index("-") != column for start in starts):
        return None
    end = len(lines)
    for number in range(starts[-1] + 1, len(lines)):
        line = lines[number]
        outdented = len(line) - len(line.lstrip(" ")) <= column and not line.startswith(" " * column + "- ")
        if line.strip() and not line.lstrip().startswith("#") and outdented:
            end = number
            break
    bounds = [*starts[1:], end]
    texts = ["".join(lines[start:stop]) for start, stop in zip(starts, bounds, strict=True)]
    return "".join(lines[: starts[0]]), texts, "".join(lines[end:])


def _trailing(text: str) -> str:
    """Return the comment and blank lines at the end of a chunk: they belong to nobody in particular."""
    lines = text.splitlines(keepends=True)
    while lines and not lines[0].strip():
        lines.pop(0)
    keep: list[str] = []
    for line in reversed(lines):
        if line.strip() and not line.lstrip().startswith("#"):
            break
        keep.append(line)
    return "".join(reversed(keep))


def _emptied(head: str) -> str:
    """Return a head whose list has become empty."""
    position = head.rfind("rules:")
    if position < 0:
        return emit_rules(())
    after = head[position + len("rules:") :]
    return head[:position] + "rules: []" + (after if after.startswith("\n") else "\n" + after)


def _new(rule: Rule, column: int) -> Chunk:
    """Write a new item with its dash where the file has its dashes."""
    lines = emit_item(rule).splitlines(keepends=True)
    text = "".join(" " * column + line[2:] for line in lines)
    return Chunk(text, read_item(to_mapping(rule), strict=False), rule)


def _changed(chunk: Chunk, rule: Rule) -> Chunk:
    """Rewrite one item, keeping its comments and the keys we do not know."""
    indent = chunk.text.index("-")
    # Comments after the item mostly speak of the next one: they stay behind it.
    trailing = _trailing(chunk.text)
    body = chunk.text.removesuffix(trailing)
    try:
        document = _round_trip().load("rules:\n" + body)
        item = _lay_over(document["rules"][0], rule)
        stream = io.StringIO()
        yaml = _round_trip()
        yaml.indent(mapping=2, sequence=indent + 2, offset=indent)
        yaml.dump(document, stream)
        text = stream.getvalue().removeprefix("rules:\n")
        reading = read_item(item, strict=False)
    except (YAMLError, *READERS_RAISE):
        fresh = _new(rule, indent)
        text, reading = fresh.text, fresh.reading
    return Chunk(text + trailing, reading, rule)


def _lay_over(item: CommentedMap, rule: Rule) -> CommentedMap:
    """Set the fields of an item to a rule's, leaving what already says the same."""
    wanted = to_mapping(rule)
    present = read_item(item, strict=False).rule
    current = to_mapping(normalise(present)) if present is not None else {}
    for key in ("path_rules", "path_default", "insecure_skip_tls_verify", "tls", "allow_private", "comment", "source"):
        if key not in wanted:
            item.pop(key, None)
    for key in ("scope", "expires_at", "created_at"):
        if key not in wanted and rule.scope == GLOBAL:
            item.pop(key, None)
    for key, value in wanted.items():
        if current.get(key) == value and key in item:
            continue
        item[key] = _paths(item.get(key), value) if key == "path_rules" else _quoted(key, value)
    return item


def _quoted(key: str, value: Any) -> Any:
    return DoubleQuotedScalarString(value) if key in ("port", "comment") else value


def _paths(present: Any, wanted: list[dict[str, Any]]) -> CommentedSeq:
    """Return path entries, reusing nodes (and their comments) of paths that stay."""
    known = {entry.get("path"): entry for entry in present or () if isinstance(entry, CommentedMap)}
    sequence = present if isinstance(present, CommentedSeq) else CommentedSeq()
    del sequence[:]
    for entry in wanted:
        node = known.get(entry["path"], CommentedMap())
        if "methods" not in entry:
            node.pop("methods", None)
        for key, value in entry.items():
            if node.get(key) != value:
                node[key] = value
        sequence.append(node)
    return sequence
