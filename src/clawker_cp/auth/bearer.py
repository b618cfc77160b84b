"""
The bearer token of a call, out of its metadata (contract 3.7). Pure.

In two steps, because of the budget of a cached call: `presented_token` is what every call pays, `is_token` scans it
and is owed only for a token nobody knows yet, before it is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

HEADER = "authorization"
PREFIX = "Bearer "
MAX_TOKEN_BYTES = 8 * 1024
_FORM = re.compile(r"[!-~]+")


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


def is_token(presented: str) -> bool:
    """
    Whether it can be a token at all: visible ASCII (RFC 6750).
    """
    return _FORM.fullmatch(presented) is not None


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """
    Return the token, "" unless there is exactly one header of the exact form with a token of sane size.
    """
    token = presented_token(metadata)
    return token if is_token(token) else ""
