"""
Which agent registered with which certificate: the table `agents`, and renewals announced for it.

This process is its only writer (I8). Synchronous like `database`. Rows of the released server are
read as they are; a malformed one is an error on look-up and left out of snapshots.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import structlog

from clawker_cp.agents.database import Database
from clawker_cp.errors import ClawkerError, InvalidInput

log = structlog.get_logger()

_THUMBPRINT = re.compile(r"[0-9a-f]{64}")
# The columns in the order of `RegisteredAgent`; a table of the released server may have them in another.
_ADD = (
    "INSERT INTO agents (thumbprint_hex, container_id, agent_name, project, registered_at, last_seen) "
    "VALUES (?, ?, ?, ?, ?, ?)"
)
_FIND = (
    "SELECT thumbprint_hex, container_id, agent_name, project, registered_at, last_seen FROM agents "
    "WHERE container_id = ?"
)
_ALL = (
    "SELECT thumbprint_hex, container_id, agent_name, project, registered_at, last_seen FROM agents "
    "ORDER BY project, agent_name, container_id"
)


@dataclass(frozen=True, slots=True)
class RegisteredAgent:
    """
    One row. `thumbprint` is the hex SHA-256 of the leaf's DER; times are Unix seconds.
    """

    thumbprint: str
    container_id: str
    agent: str
    project: str
    registered_at: int
    last_seen: int


class MalformedRow(ClawkerError):
    """A stored row that cannot be meant; it has to be evicted before that agent can register."""


class Registry:
    """
    Rows by container id. Every failure of the file is raised: a short list would read as "nobody".
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, row: RegisteredAgent) -> None:
        """
        Insert a row. Raises `InvalidInput` for an empty or zero field, `Conflict` for a known agent.
        """
        problem = _problem(row)
        if problem:
            raise InvalidInput(f"registry: {problem}")
        self._database.execute(
            _ADD,
            (row.thumbprint, row.container_id, row.agent, row.project, row.registered_at, row.last_seen),
        )

    def find(self, container_id: str) -> RegisteredAgent | None:
        """
        The row of a container. Raises `MalformedRow` if what is stored cannot be meant.
        """
        rows = self._database.query(_FIND, (container_id,))
        if not rows:
            return None
        row = RegisteredAgent(*rows[0])
        problem = _problem(row)
        if problem:
            raise MalformedRow(f"registry: {problem}", code="MALFORMED_ROW")
        return row

    def snapshot(self) -> list[RegisteredAgent]:
        """
        All rows ordered by (project, agent); malformed ones are logged and left out.
        """
        found = []
        for values in self._database.query(_ALL):
            row = RegisteredAgent(*values)
            problem = _problem(row)
            if problem:
                log.warning("agentregistry_row_skipped", container_id=str(row.container_id)[:12], problem=problem)
            else:
                found.append(row)
        return found

    def seen(self, container_id: str, at_unix: int) -> None:
        """
        Move `last_seen` forward; an unknown container changes nothing.
        """
        self._database.execute(
            "UPDATE agents SET last_seen = ? WHERE container_id = ? AND last_seen < ?", (at_unix, container_id, at_unix)
        )

    def evict(self, container_id: str) -> bool:
        """
        Delete a container's row and its announced renewal; returns whether there was a row.
        """
        with self._database.transaction():
            self._database.execute("DELETE FROM renewals WHERE container_id = ?", (container_id,))
            return self._database.execute("DELETE FROM agents WHERE container_id = ?", (container_id,)) > 0

    def keep_only(self, existing: Collection[str]) -> list[str]:
        """
        Evict rows of containers that no longer exist; returns their ids.
        """
        gone = [row[0] for row in self._database.query("SELECT container_id FROM agents") if row[0] not in existing]
        for container_id in gone:
            self.evict(container_id)
        return gone

    def announce_renewal(self, container_id: str, thumbprint: str, not_after: int) -> None:
        """
        Say, before it is delivered, which new leaf a container may register with.
        """
        if not _THUMBPRINT.fullmatch(thumbprint) or set(thumbprint) == {"0"}:
            raise InvalidInput("registry: the thumbprint has to be 64 hex digits, not all zero")
        self._database.execute(
            "INSERT INTO renewals VALUES (?, ?, ?) ON CONFLICT (container_id) DO UPDATE "
            "SET thumbprint_hex = excluded.thumbprint_hex, not_after = excluded.not_after",
            (container_id, thumbprint, not_after),
        )

    def take_renewal(self, container_id: str, thumbprint: str, at_unix: int) -> bool:
        """
        Move a container's row to an announced leaf; False if none was announced or it has ended.
        """
        with self._database.transaction():
            known = self._database.query(
                "SELECT 1 FROM renewals WHERE container_id = ? AND thumbprint_hex = ? AND not_after > ?",
                (container_id, thumbprint, at_unix),
            )
            if not known:
                return False
            self._database.execute("DELETE FROM renewals WHERE container_id = ?", (container_id,))
            changed = self._database.execute(
                "UPDATE agents SET thumbprint_hex = ?, last_seen = ? WHERE container_id = ?",
                (thumbprint, at_unix, container_id),
            )
            return changed > 0


def _problem(row: RegisteredAgent) -> str:
    """What is wrong with a row, "" if nothing is."""
    if not isinstance(row.thumbprint, str) or not _THUMBPRINT.fullmatch(row.thumbprint):
        return "the thumbprint is not 64 hex digits"
    if set(row.thumbprint) == {"0"}:
        return "the thumbprint is zero"
    if not isinstance(row.container_id, str) or not row.container_id:
        return "the container id is empty"
    if not isinstance(row.agent, str) or not row.agent or not isinstance(row.project, str):
        return "the agent's name is empty"
    times = (row.registered_at, row.last_seen)
    if not all(isinstance(at, int) and at > 0 for at in times):
        return "a time is zero"
    return ""
