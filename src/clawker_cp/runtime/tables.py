"""
Entries by id with look-ups by what they say, bounded: what a view of the bus is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator
from typing import Generic, TypeVar

E = TypeVar("E")


class Table(Generic[E]):
    """
    At most `capacity` immutable entries. An index gives the value an entry is found by, None for not at all.

    A new entry that does not fit is refused and counted, a known one can always be replaced. Changes cost
    the same however many entries there are.
    """

    def __init__(self, capacity: int, **indexes: Callable[[E], Hashable | None]) -> None:
        self._capacity = capacity
        self._entries: dict[str, E] = {}
        self._indexes = indexes
        # Keys in the order they came, so that answers are deterministic.
        self._found: dict[str, dict[Hashable, dict[str, None]]] = {name: {} for name in indexes}
        self.refused = 0

    def put(self, key: str, entry: E) -> bool:
        """
        Add or replace; False when nothing changed: it was equal, or there was no room.
        """
        known = self._entries.get(key)
        if known is None and len(self._entries) >= self._capacity:
            self.refused += 1
            return False
        if known == entry:
            return False
        if known is not None:
            self._unindex(key, known)
        self._entries[key] = entry
        for name, index in self._indexes.items():
            value = index(entry)
            if value is not None:
                self._found[name].setdefault(value, {})[key] = None
        return True

    def remove(self, key: str) -> bool:
        """
        Forget an entry; False when it was not known.
        """
        known = self._entries.pop(key, None)
        if known is None:
            return False
        self._unindex(key, known)
        return True

    def get(self, key: str) -> E | None:
        """
        The entry of an id.
        """
        return self._entries.get(key)

    def find(self, index: str, value: Hashable) -> list[E]:
        """
        Every entry with this value.
        """
        return [self._entries[key] for key in self._found[index].get(value, ())]

    def only(self, index: str, value: Hashable) -> E | None:
        """
        The entry with this value if exactly one has it.
        """
        keys = self._found[index].get(value, {})
        return self._entries[next(iter(keys))] if len(keys) == 1 else None

    def keys_but(self, kept: Container[str]) -> list[str]:
        """
        The ids that are not in `kept`.
        """
        return [key for key in self._entries if key not in kept]

    def copy(self) -> dict[str, E]:
        """
        All entries as they are now.
        """
        return dict(self._entries)

    def __iter__(self) -> Iterator[E]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def _unindex(self, key: str, entry: E) -> None:
        for name, index in self._indexes.items():
            value = index(entry)
            if value is None:
                continue
            keys = self._found[name][value]
            del keys[key]
            if not keys:
                del self._found[name][value]
