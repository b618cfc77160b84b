"""
Which agents may only speak to the control plane, and why (table `quarantines`, R16).

A registration ends `trust` only; an operator's release ends any cause, and the exposures accepted by it
are remembered, so that the same ones do not quarantine the agent again. Synchronous like `database`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from clawker_cp.agents.database import Database
from clawker_cp.errors import InvalidInput

TRUST, EXPOSURE, OPERATOR = "trust", "exposure", "operator"
CAUSES = (TRUST, EXPOSURE, OPERATOR)
_ACCEPTED = "accepted"  # a row that quarantines nobody: what an operator released


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One quarantined agent; `since` is Unix seconds."""

    container_id: str
    cause: str
    reason: str
    since: int


class Quarantines:
    """
    Durable before the kernel hears of it, so that a restart does not release anybody.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, container_id: str, cause: str, reason: str, since: int) -> None:
        """
        Quarantine; an operator's word outranks the other causes and is not overwritten by them.
        """
        if cause not in CAUSES:
            raise InvalidInput(f"cause: {cause!r} is not one of {', '.join(CAUSES)}")
        # One statement: an operator's word may come from another thread at the same time.
        self._database.execute(
            "INSERT INTO quarantines (container_id, reason, by_operator, since, cause) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (container_id) DO UPDATE SET reason = excluded.reason, by_operator = excluded.by_operator, "
            "since = excluded.since, cause = excluded.cause WHERE excluded.by_operator OR NOT quarantines.by_operator",
            (container_id, reason, int(cause == OPERATOR), since, cause),
        )

    def get(self, container_id: str) -> Quarantined | None:
        """
        Why an agent is quarantined, None if it is not.
        """
        rows = self._database.query(
            "SELECT container_id, cause, reason, since FROM quarantines WHERE container_id = ? AND cause != ?",
            (container_id, _ACCEPTED),
        )
        return Quarantined(*rows[0]) if rows else None

    def all(self) -> dict[str, Quarantined]:
        """
        Every quarantined agent by container id.
        """
        rows = self._database.query(
            "SELECT container_id, cause, reason, since FROM quarantines WHERE cause != ?", (_ACCEPTED,)
        )
        return {row[0]: Quarantined(*row) for row in rows}

    def registered(self, container_id: str) -> bool:
        """
        A fresh registration: ends a quarantine for `trust`; returns whether it did.
        """
        return (
            self._database.execute(
                "DELETE FROM quarantines WHERE container_id = ? AND cause = ?", (container_id, TRUST)
            )
            > 0
        )

    def release(self, container_id: str, exposures: Iterable[str] = ()) -> bool:
        """
        An operator's release, accepting `exposures` from now on; returns whether there was a quarantine.
        """
        accepted = "\n".join(sorted(set(exposures)))
        with self._database.transaction():
            was = self.get(container_id) is not None
            if accepted:
                self._database.execute(
                    "INSERT INTO quarantines VALUES (?, '', 0, 0, ?, ?) ON CONFLICT (container_id) DO UPDATE SET "
                    "reason = '', by_operator = 0, since = 0, cause = excluded.cause, exposures = excluded.exposures",
                    (container_id, _ACCEPTED, accepted),
                )
            else:
                self.forget(container_id)
        return was

    def accepts(self, container_id: str, exposures: Iterable[str]) -> bool:
        """
        Whether an operator accepted all of these exposures of an agent.
        """
        rows = self._database.query("SELECT exposures FROM quarantines WHERE container_id = ?", (container_id,))
        return bool(rows) and set(exposures) <= set(rows[0][0].split("\n"))

    def forget(self, container_id: str) -> None:
        """
        Drop what is known of an agent that was destroyed.
        """
        self._database.execute("DELETE FROM quarantines WHERE container_id = ?", (container_id,))
