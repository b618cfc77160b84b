"""
Where the bearer token of a call stands in its metadata (contract 3.7). Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

HEADER = "authorization"
PREFIX = "Bearer "
MAX_TOKEN_BYTES = 8 * 1024


def presented_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """
    Return what stands after `Bearer ` in the only header of that name; "" without one, or above 8 KiB.

    The prefix is case-sensitive.
    """
    found: str | bytes | None = None
    for key, value in metadata:
        if key == HEADER:
            if found is not None:
                return ""
            found = value
    if type(found) is not str or not found.startswith(PREFIX) or len(found) > MAX_TOKEN_BYTES + len(PREFIX):
        return ""
    return found[len(PREFIX) :]
