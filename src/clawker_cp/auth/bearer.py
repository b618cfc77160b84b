"""
The bearer token of a call, out of its metadata (contract 3.7). Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

HEADER = "authorization"
PREFIX = "Bearer "
MAX_TOKEN_BYTES = 8 * 1024


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """
    Return the token, "" unless there is exactly one header of the exact form with a token of sane size.

    The prefix is case-sensitive; a token is visible ASCII (RFC 6750).
    """
    found = ""
    for key, value in metadata:
        if key == HEADER:
            if found or not isinstance(value, str):
                return ""
            found = value
    token = found[len(PREFIX) :] if found.startswith(PREFIX) else ""
    if not token or len(token) > MAX_TOKEN_BYTES or not token.isascii():
        return ""
    return "" if any(not "!" <= character <= "~" for character in token) else token
