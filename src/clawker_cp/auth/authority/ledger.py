"""
What the authority may not forget: spent assertions, and what was revoked (tables `oauth_jti`, `oauth_revoked`).

Synchronous: callers on the loop go through a thread, a commit waits for the disk.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from clawker_cp.errors import Conflict

SWEEP_EVERY = 256


class Rows(Protocol):
    """The server's database."""

    def execute(self, statement: str, values: Sequence[Any] = ()) -> int: ...
    def query(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]: ...
    def transaction(self) -> AbstractContextManager[None]: ...


class Ledger:
    """
    Spends and bars, in any number of threads. What is barred is also kept in memory: every introspection asks.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._barred: dict[tuple[str, str], tuple[int, int]] = {}
        self._changing = threading.Lock()  # what is barred, in memory and on disk
        self._spent = 0

    def load(self, now: float) -> None:
        """
        Read what an earlier run barred, and drop what is over.
        """
        self._sweep(now)
        rows = self._rows.query("SELECT kind, id, issued_before, exp FROM oauth_revoked")
        self._barred = {(kind, id_): (before, exp) for kind, id_, before, exp in rows}

    def spend(self, jti: str, client_id: str, exp: int, now: float) -> bool:
        """
        Spend an assertion's number, durably; False if it was spent before.
        """
        self._spent += 1
        if self._spent % SWEEP_EVERY == 0:
            self._sweep(now)
        try:
            self._rows.execute("INSERT INTO oauth_jti (jti, client_id, exp) VALUES (?, ?, ?)", (jti, client_id, exp))
        except Conflict:
            return False
        return True

    def bar(self, kind: str, id_: str, issued_before: int, exp: int) -> None:
        """
        Refuse tokens from now on: by `jti`, `digest` (hex SHA-256), `client`, or `all`, until `exp`.

        For `client` and `all` those issued up to `issued_before`; an earlier moment does not replace a later one.
        """
        with self._changing:
            before, until = self._barred.get((kind, id_), (0, 0))
            bar = (max(issued_before, before), max(exp, until))
            self._rows.execute(
                "INSERT OR REPLACE INTO oauth_revoked (kind, id, issued_before, exp) VALUES (?, ?, ?, ?)",
                (kind, id_, *bar),
            )
            self._barred[kind, id_] = bar

    def is_barred(self, *, jti: str, digest: str, client_id: str, iat: int) -> bool:
        """
        Whether a token was revoked.
        """
        if ("jti", jti) in self._barred or ("digest", digest) in self._barred:
            return True
        for key in (("client", client_id), ("all", "")):
            bar = self._barred.get(key)
            if bar is not None and iat <= bar[0]:
                return True
        return False

    def barred_until(self, client_id: str) -> int:
        """
        Up to when tokens of a client are revoked as a whole, in Unix seconds; 0 = never.
        """
        return max((self._barred.get(key, (0, 0))[0] for key in (("client", client_id), ("all", ""))), default=0)

    def _sweep(self, now: float) -> None:
        # Ten seconds of leeway count for an assertion that has ended (contract 3.3).
        self._rows.execute("DELETE FROM oauth_jti WHERE exp < ?", (int(now) - 60,))
        with self._changing:
            self._rows.execute("DELETE FROM oauth_revoked WHERE exp < ?", (int(now) - 60,))
            self._barred = {key: bar for key, bar in self._barred.items() if bar[1] >= now - 60}
