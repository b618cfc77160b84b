"""
The numbers of `allocations.py` on disk (contract 1.8, 7.9).

`route-identities.yaml` and `allocations.yaml`: YAML whose items are JSON flow mappings, one a
line, because they are written at every change and may hold ten thousand entries. A table
that contradicts itself is kept as `.corrupt` and begun anew. Synchronous.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from clawker_cp.errors import ClawkerError, InvalidInput
from clawker_cp.firewall.allocations import (
    BANDS,
    EMPTY,
    IDENTITY_LAST,
    NEVER,
    POLICY_FIRST,
    POLICY_LAST,
    Allocations,
    ListenerKey,
)
from clawker_cp.firewall.documents import parse_yaml
from clawker_cp.firewall.plan import IDENTITY_FIRST
from clawker_cp.firewall.ports import MAX_PORT
from clawker_cp.runtime.durable import write_durably

IDENTITIES_FILE = "route-identities.yaml"
ALLOCATIONS_FILE = "allocations.yaml"

log = structlog.get_logger()


class _CorruptError(ValueError):
    """The table contradicts itself; the message says where."""


@dataclass(frozen=True, slots=True)
class LoadedAllocations:
    """What the files hold; `corrupt` says why a table was begun anew, so all kernel rows must be rebuilt."""

    allocations: Allocations
    corrupt: tuple[str, ...] = ()


class AllocationFiles:
    """Loads and saves allocations; one caller at a time."""

    def __init__(self, directory: Path) -> None:
        self._identities = directory / IDENTITIES_FILE
        self._allocations = directory / ALLOCATIONS_FILE
        self._written: dict[Path, bytes] = {}

    def load(self) -> LoadedAllocations:
        """Read both tables; a missing one is empty, a corrupt one is set aside with an event."""
        corrupt: list[str] = []
        identities = self._table(self._identities, _read_identities, EMPTY, corrupt)
        others = self._table(self._allocations, _read_allocations, EMPTY, corrupt)
        merged = replace(others, identities=identities.identities, next_identity=identities.next_identity)
        return LoadedAllocations(merged, tuple(corrupt))

    def _table(
        self, path: Path, read: Callable[[Mapping[str, Any]], Allocations], empty: Allocations, corrupt: list[str]
    ) -> Allocations:
        try:
            text = path.read_text()
        except FileNotFoundError:
            return empty
        except (OSError, UnicodeDecodeError) as error:
            why = f"{path} cannot be read: {error}"
        else:
            try:
                return read(_parse(text))
            except (InvalidInput, _CorruptError) as error:
                why = f"{path}: {error}"
        log.error("allocations_corrupt", path=str(path), cause=why)
        corrupt.append(why)
        with contextlib.suppress(OSError):
            path.replace(path.with_name(path.name + ".corrupt"))
        return empty

    def save(self, allocations: Allocations) -> bool:
        """
        Write what differs from what was written last; returns whether anything was.

        Raises `ClawkerError` (`ROUTE_SYNC`); the caller keeps the numbers and saves again at its
        next sync.
        """
        written = False
        tables = ((self._identities, _identities_text(allocations)), (self._allocations, _text(allocations)))
        for path, text in tables:
            data = text.encode()
            if self._written.get(path) == data:
                continue
            try:
                write_durably(path, data)
            except OSError as error:
                raise ClawkerError(f"{path} could not be written: {error.strerror}", code="ROUTE_SYNC") from error
            self._written[path] = data
            written = True
        return written


def _identities_text(allocations: Allocations) -> str:
    entries = [{"dst": dst, "id": number} for dst, number in sorted(allocations.identities.items())]
    return _listing("entries", entries) + f"next: {allocations.next_identity}\n"


def _text(allocations: Allocations) -> str:
    policies = [{"key": key, "id": number} for key, number in sorted(allocations.policies.items())]
    listeners = [
        {"l4": l4, "dst": dst, "port": port, "listen": listen}
        for (l4, dst, port), listen in sorted(allocations.listeners.items())
    ]
    return (
        _listing("policies", policies) + _listing("listeners", listeners) + f"next_policy: {allocations.next_policy}\n"
    )


def _listing(key: str, items: list[dict[str, Any]]) -> str:
    if not items:
        return f"{key}: []\n"
    return f"{key}:\n" + "".join(f"- {json.dumps(item)}\n" for item in items)


def _parse(text: str) -> Mapping[str, Any]:
    """Parse our own layout line by line; anything else goes to the YAML parser, which is a hundred times slower."""
    document: dict[str, Any] = {}
    items: list[Any] = []
    try:
        for line in text.splitlines():
            if line.startswith("- {"):
                items.append(json.loads(line[2:]))
                continue
            key, colon, value = line.partition(":")
            if not colon or not key.isidentifier():
                raise ValueError("not our layout")
            if value.strip():
                document[key] = json.loads(value)
            else:
                document[key] = items = []
        return document
    except ValueError:
        found = parse_yaml(text)
        if not isinstance(found, Mapping):
            raise _CorruptError("not a table") from None
        return found


def _items(document: Mapping[str, Any], key: str, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    items = document.get(key)
    if items is None:
        return []
    if not isinstance(items, list):
        raise _CorruptError(f'"{key}" is not a list')
    for item in items:
        sound = isinstance(item, dict) and all(type(item.get(field)) is kind for field, kind in fields.items())
        if not sound:
            raise _CorruptError(f'"{key}" has an entry that is not {", ".join(fields)}')
    return items


def _cursor(document: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = document.get(key, low)
    if type(value) is not int or not low <= value <= high:
        raise _CorruptError(f'"{key}" is out of range')
    return value


def _once(seen: dict[Any, Any], key: Any, number: int, what: str) -> None:
    if key in seen:
        raise _CorruptError(f"{what} {key} is there twice")
    if number in seen.values():
        raise _CorruptError(f"number {number} is given twice")
    seen[key] = number


def _read_identities(document: Mapping[str, Any]) -> Allocations:
    identities: dict[str, int] = {}
    numbers: set[int] = set()
    for item in _items(document, "entries", {"dst": str, "id": int}):
        dst, number = item["dst"], item["id"]
        if not IDENTITY_FIRST <= number <= IDENTITY_LAST:
            raise _CorruptError(f"identity {number} of {dst} is out of band")
        if dst in identities or number in numbers:
            raise _CorruptError(f"{dst} or its identity {number} is there twice")
        identities[dst] = number
        numbers.add(number)
    cursor = _cursor(document, "next", IDENTITY_FIRST, IDENTITY_LAST)
    return replace(EMPTY, identities=identities, next_identity=cursor)


def _read_allocations(document: Mapping[str, Any]) -> Allocations:
    policies: dict[str, int] = {}
    for item in _items(document, "policies", {"key": str, "id": int}):
        if not POLICY_FIRST <= item["id"] <= POLICY_LAST:
            raise _CorruptError(f"policy {item['id']} of {item['key']} is out of range")
        _once(policies, item["key"], item["id"], "policy")
    listeners: dict[ListenerKey, int] = {}
    taken: set[tuple[int, int]] = set()
    for item in _items(document, "listeners", {"l4": int, "dst": str, "port": int, "listen": int}):
        key, listen = (item["l4"], item["dst"], item["port"]), item["listen"]
        if not any(listen in band for band in BANDS.get(item["l4"], ())) or listen in NEVER:
            raise _CorruptError(f"listener {listen} of {item['dst']} is out of band")
        if not 1 <= item["port"] <= MAX_PORT or key in listeners or (item["l4"], listen) in taken:
            raise _CorruptError(f"listener {listen} of {item['dst']} contradicts another")
        listeners[key] = listen
        taken.add((item["l4"], listen))
    cursor = _cursor(document, "next_policy", POLICY_FIRST, POLICY_LAST)
    return replace(EMPTY, policies=policies, next_policy=cursor, listeners=listeners)
