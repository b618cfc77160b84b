"""
Whether what a call presents can be a bearer token at all (contract 3.7). Pure.

In two steps, because of the budget of a cached call: `accel.presented_token` is what every call pays, `is_token` scans
it and is owed only for a token nobody knows yet, before it is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from clawker_cp.accel import presented_token

_FORM = re.compile(r"[!-~]+")


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
