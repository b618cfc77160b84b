"""
The one SQLite file of this server, `controlplane.db`: opening, adopting, migrating, transactions.

Tables are used through the classes that own them (`registry`, `quarantines`, `sandbox_rows`; the token
authority has its own). Synchronous and thread-safe: callers on the loop go through a thread, because a
commit waits for the disk (`synchronous=FULL`: a lost row could not be registered again, its assertion
is spent).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from clawker_cp.errors import ClawkerError, Conflict, Unavailable

log = structlog.get_logger()

SCHEMA_VERSION = 1
RELEASED_MARK = "goose_db_version"  # a table that only the released server makes
_SCHEMA = """
CREATE TABLE IF NOT EXISTS agents (
    thumbprint_hex TEXT NOT NULL UNIQUE, container_id TEXT NOT NULL UNIQUE, agent_name TEXT NOT NULL,
    project TEXT NOT NULL, registered_at INTEGER NOT NULL, last_seen INTEGER NOT NULL,
    PRIMARY KEY (thumbprint_hex, container_id));
CREATE INDEX IF NOT EXISTS idx_name_project ON agents (project, agent_name);
CREATE TABLE IF NOT EXISTS renewals (
    container_id TEXT PRIMARY KEY, thumbprint_hex TEXT NOT NULL, not_after INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS quarantines (
    container_id TEXT PRIMARY KEY, reason TEXT NOT NULL, by_operator INTEGER NOT NULL, since INTEGER NOT NULL,
    cause TEXT NOT NULL, exposures TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS oauth_jti (jti TEXT PRIMARY KEY, client_id TEXT NOT NULL, exp INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS oauth_revoked (
    kind TEXT NOT NULL, id TEXT NOT NULL, issued_before INTEGER NOT NULL, exp INTEGER NOT NULL,
    PRIMARY KEY (kind, id));
CREATE TABLE IF NOT EXISTS sandboxes (
    id TEXT PRIMARY KEY, spec TEXT NOT NULL, state INTEGER NOT NULL, created_at INTEGER NOT NULL,
    started_at INTEGER NOT NULL, finished_at INTEGER NOT NULL, exit_code INTEGER NOT NULL);
"""


class Database:
    """
    One connection, one writer. Construction does nothing; `open` makes or adopts the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.RLock()

    def open(self) -> None:
        """
        Open the file, mode 0600, and bring its schema to this version.

        A database of the released server keeps its rows. Raises `Conflict` for one of a later version,
        `Unavailable` for a file that cannot be used; it is not changed then.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            # Made before SQLite does, which would take the umask's mode.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self.path.chmod(0o600)
            connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=5.0)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        try:
            self._check_version(connection)  # before anything, WAL mode too, writes to the file
            for pragma in ("journal_mode=WAL", "busy_timeout=5000", "foreign_keys=ON", "synchronous=FULL"):
                connection.execute(f"PRAGMA {pragma}")
            self._migrate(connection)
        except sqlite3.Error as error:
            connection.close()
            raise self._unusable(error) from error
        except ClawkerError:
            connection.close()
            raise
        self._connection = connection

    def close(self) -> None:
        """
        Close the file; safe to call twice.
        """
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """
        Everything inside is committed as one, or nothing of it.
        """
        with self._lock:
            self._run("BEGIN IMMEDIATE", ())
            try:
                yield
            except BaseException:
                self._run("ROLLBACK", ())
                raise
            self._run("COMMIT", ())

    def execute(self, statement: str, values: Sequence[Any] = ()) -> int:
        """
        Run one statement; returns how many rows it changed. Raises `Conflict` where a constraint forbids it.
        """
        with self._lock:
            return self._run(statement, values).rowcount

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """
        All rows of a query. A failure is raised, never an empty list.
        """
        with self._lock:
            return self._run(statement, values).fetchall()

    def _run(self, statement: str, values: Sequence[Any]) -> sqlite3.Cursor:
        if self._connection is None:
            raise Unavailable(f"{self.path} is not open")
        try:
            return self._connection.execute(statement, values)
        except sqlite3.IntegrityError as error:
            raise Conflict(f"{self.path.name}: {error}") from error
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _check_version(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise Conflict(
                f"{self.path} was written by a later version (schema {version}, this one knows {SCHEMA_VERSION})",
                hint="run that version again, or move the file away",
            )

    def _migrate(self, connection: sqlite3.Connection) -> None:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        connection.execute("BEGIN IMMEDIATE")
        try:
            if RELEASED_MARK in tables and "agents" in tables:
                columns = {row[1] for row in connection.execute("PRAGMA table_info(agents)")}
                if "canonical_cn" in columns:
                    connection.execute("ALTER TABLE agents DROP COLUMN canonical_cn")
                    log.info("agentregistry_adopted", path=str(self.path))
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def _unusable(self, error: Exception) -> Unavailable:
        # SQLite's own class for a file that it cannot make sense of; what the disk does has others.
        spoilt = type(error) is sqlite3.DatabaseError
        hint = "restore it, or move it away: agents register again then" if spoilt else "is the disk full or read-only?"
        said = error.strerror if isinstance(error, OSError) else error
        return Unavailable(f"{self.path}: {said}", code="REGISTRY_UNAVAILABLE", hint=hint)
