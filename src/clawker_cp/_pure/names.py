"""
Longest match of DNS names over exact names and wildcard bases, in plain Python.

Twin of `_fast/names.pyx`; chosen by `accel.py`. The gate and the compile ask it for every name.
"""

from __future__ import annotations

from collections.abc import Mapping

MAX_NAME = 253


class NameMatcher:
    """
    Match a name against exact names, then against the longest wildcard base.

    ASCII case does not count, dots at the ends of table entries neither. A base stands for itself
    and everything below it; the base "" stands for every name. Values are 0 or more; negative
    values and names above 253 characters raise ValueError.
    """

    def __init__(self, exact: Mapping[str, int], wildcard: Mapping[str, int]) -> None:
        self._exact = _normalised(exact)
        self._below = _normalised(wildcard)
        self._exact.pop(b"", None)
        self._everything = self._below.pop(b"", -1)
        self.size = len(self._exact) + len(self._below)

    def __len__(self) -> int:
        return self.size

    def match(self, name: str | bytes) -> int:
        """
        Return the value of the exact entry, else of the longest base at or above the name, else -1.

        One trailing dot is tolerated. The empty name, names above 253 characters and names that are
        not ASCII match nothing.
        """
        if isinstance(name, str):
            if not name.isascii():
                return -1
            name = name.encode("ascii")
        elif not isinstance(name, bytes):
            raise TypeError(f"name must be str or bytes, not {type(name).__name__}")
        text = name.removesuffix(b".").lower()
        if not text or len(text) > MAX_NAME:
            return -1
        found = self._exact.get(text)
        if found is not None:
            return found
        while text:
            found = self._below.get(text)
            if found is not None:
                return found
            text = text.partition(b".")[2]
        return self._everything


def _normalised(names: Mapping[str, int]) -> dict[bytes, int]:
    result: dict[bytes, int] = {}
    for name, value in names.items():
        if value < 0:
            raise ValueError(f"value of {name!r} is {value}: must not be negative, -1 means no match")
        key = (name.encode("ascii") if isinstance(name, str) else bytes(name)).strip(b".").lower()
        if len(key) > MAX_NAME:
            raise ValueError(f"name {name!r} is longer than {MAX_NAME} characters")
        result[key] = value
    return result
