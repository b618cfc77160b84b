"""
Entries by id, bounded: what a view of the bus is made of.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Generic, TypeVar

E = TypeVar("E")


class Table(Generic[E]):
    """
    At most `capacity` immutable entries.

    A new entry that does not fit is refused and counted, a known one can always be replaced.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: dict[str, E] = {}
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
        self._entries[key] = entry
        return True

    def remove(self, key: str) -> bool:
        """
        Forget an entry; False when it was not known.
        """
        return self._entries.pop(key, None) is not None

    def get(self, key: str) -> E | None:
        """
        The entry of an id.
        """
        return self._entries.get(key)

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

    def __len__(self) -> int:
        return len(self._entries)
