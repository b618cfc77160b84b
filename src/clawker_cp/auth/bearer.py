"""
The bearer token of a call, out of its metadata (contract 3.7). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

HEADER = "authorization"
MAX_TOKEN_BYTES = 8 * 1024
# One scan in C: asking character by character costs twenty microseconds of a two microsecond budget.
_FORM = re.compile(rf"Bearer ([!-~]{{1,{MAX_TOKEN_BYTES}}})")


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """
    Return the token, "" unless there is exactly one header of the exact form with a token of sane size.

    The prefix is case-sensitive; a token is visible ASCII (RFC 6750).
    """
    found: str | bytes | None = None
    for key, value in metadata:
        if key == HEADER:
            if found is not None:
                return ""
            found = value
    if not isinstance(found, str):
        return ""
    form = _FORM.fullmatch(found)
    return form[1] if form else ""
