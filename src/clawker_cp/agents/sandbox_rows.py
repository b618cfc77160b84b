"""
The sandboxes of this server, ended ones included (table `sandboxes`), for `ListSandboxes` after a restart.

What runs is the engine's to know; this is the durable history of it. Synchronous like `database`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import orjson

from clawker_cp.agents.database import Database

KEPT = 1024  # ended sandboxes; older ones are dropped
UNKNOWN_END = 137  # of a sandbox that ended while nobody watched


class SandboxState(enum.IntEnum):
    """Numbers of the wire's `SandboxState`."""

    CREATED = 1
    RUNNING = 2
    EXITED = 3


@dataclass(frozen=True, slots=True)
class SandboxRow:
    """One sandbox; `spec` is JSON, times are Unix seconds, 0 = not yet."""

    id: str
    spec: str
    state: SandboxState
    created_at: int
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0


class SandboxRows:
    """Rows by id."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, row: SandboxRow) -> None:
        """
        Insert a row or replace it.
        """
        self._database.execute(
            "INSERT OR REPLACE INTO sandboxes VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row.id, row.spec, int(row.state), row.created_at, row.started_at, row.finished_at, row.exit_code),
        )

    def get(self, sandbox_id: str) -> SandboxRow | None:
        """
        The row of an id.
        """
        rows = self._database.query("SELECT * FROM sandboxes WHERE id = ?", (sandbox_id,))
        return _row(rows[0]) if rows else None

    def all(self) -> list[SandboxRow]:
        """
        Every row, oldest first.
        """
        return [_row(row) for row in self._database.query("SELECT * FROM sandboxes ORDER BY created_at, id")]

    def started(self, sandbox_id: str, at_unix: int) -> None:
        """
        Note that the command runs.
        """
        self._change(sandbox_id, state=SandboxState.RUNNING, started_at=at_unix)

    def finished(self, sandbox_id: str, at_unix: int, exit_code: int) -> None:
        """
        Note the end, and drop the oldest ended rows above `KEPT`. One that goes with its end, or is being removed, is
        forgotten.
        """
        with self._database.transaction():
            row = self.get(sandbox_id)
            if row is not None and _goes_at_end(row):
                self.remove(sandbox_id)
            elif row is not None:
                self.put(replace(row, state=SandboxState.EXITED, finished_at=at_unix, exit_code=exit_code))
        self._database.execute(
            "DELETE FROM sandboxes WHERE state = ? AND id NOT IN "
            "(SELECT id FROM sandboxes WHERE state = ? ORDER BY finished_at DESC, id LIMIT ?)",
            (SandboxState.EXITED, SandboxState.EXITED, KEPT),
        )

    def forget_at_end(self, sandbox_id: str) -> None:
        """
        Note that a sandbox is being removed: whoever finds it ended forgets it, also after a kill.
        """
        with self._database.transaction():
            row = self.get(sandbox_id)
            if row is not None:
                spec = orjson.loads(row.spec)
                spec["extra"] = {**spec.get("extra", {}), "auto_remove": True}
                self.put(replace(row, spec=orjson.dumps(spec).decode()))

    def forget_ended(self, ids: Collection[str]) -> None:
        """
        Forget those of these, which have ended, that were being removed or go with their end.
        """
        for row in self.all():
            if row.id in ids and _goes_at_end(row):
                self.remove(row.id)

    def settle(self, living: Collection[str], at_unix: int, exit_code: Callable[[str], int | None]) -> None:
        """
        Bring the rows to what became of sandboxes while no server ran: those that do not live have ended, with the
        code that `exit_code` knows or `UNKNOWN_END`.

        Forgotten are those that were never started, were being removed, or go with their end.
        """
        for row in self.all():
            if row.id in living:
                continue
            code = exit_code(row.id)
            if row.state is SandboxState.CREATED and code is None:
                self.remove(row.id)
            elif row.state is not SandboxState.EXITED or _goes_at_end(row):
                self.finished(row.id, at_unix, UNKNOWN_END if code is None else code)

    def remove(self, sandbox_id: str) -> bool:
        """
        Forget a sandbox; returns whether it was known.
        """
        return self._database.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,)) > 0

    def _change(self, sandbox_id: str, **changes: Any) -> None:
        with self._database.transaction():
            row = self.get(sandbox_id)
            if row is not None:
                self.put(replace(row, **changes))


def _row(values: tuple[Any, ...]) -> SandboxRow:
    row = SandboxRow(*values)
    return replace(row, state=SandboxState(row.state))


def _goes_at_end(row: SandboxRow) -> bool:
    return bool(orjson.loads(row.spec).get("extra", {}).get("auto_remove"))
