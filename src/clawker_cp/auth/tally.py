"""
How many tokens were given and refused, by labels that nobody outside can choose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import orjson

from clawker_cp.auth.scopes import ADMIN, AGENT_CLIENT, CLI_CLIENT, REGISTER

CLIENTS = {ADMIN: CLI_CLIENT, REGISTER: AGENT_CLIENT}
ERRORS = frozenset({
    "invalid_request", "unsupported_grant_type", "invalid_client", "invalid_scope", "temporarily_unavailable",
    "server_error",
})  # fmt: skip
OTHER = "other"
LOOKED_AT_BYTES = 64 * 1024


class TokenTally:
    """
    Counts answers of a token endpoint: `issued` by client, `refused` by the error's code.
    """

    def __init__(self) -> None:
        self.issued: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def count(self, status: int, body: Mapping[str, Any] | bytes | None) -> None:
        """
        Count one answer. What cannot be read counts as `other`; nothing of the body is kept.
        """
        said = _read(body)
        if status == 200:
            # Each of our clients has one scope of its own, and the answer names the scope only.
            self.issued[CLIENTS.get(str(said.get("scope")), OTHER)] += 1
        else:
            error = said.get("error")
            self.refused[error if error in ERRORS else OTHER] += 1


def _read(body: Mapping[str, Any] | bytes | None) -> Mapping[str, Any]:
    if isinstance(body, bytes):
        try:
            body = orjson.loads(body) if len(body) <= LOOKED_AT_BYTES else None
        except orjson.JSONDecodeError:
            body = None
    return body if isinstance(body, Mapping) else {}
