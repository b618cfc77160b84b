"""The one database: durable, private, adopted from the released server, refused when it is not ours."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clawker_cp.agents.database import SCHEMA_VERSION, Database
from clawker_cp.agents.registry import Registry
from clawker_cp.errors import Conflict, Unavailable

Opened = Callable[[Path], Database]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Opens databases; closes them when the test is over."""
    with contextlib.ExitStack() as stack:

        def open_one(path: Path) -> Database:
            database = Database(path)
            database.open()
            stack.callback(database.close)
            return database

        yield open_one


def test_a_new_database_is_private_and_durable(tmp_path: Path, opened: Opened) -> None:
    """The file is root's only, in WAL mode, synced on every commit, with our schema version."""
    database = opened(tmp_path / "deep" / "controlplane.db")
    assert stat.S_IMODE(database.path.stat().st_mode) == 0o600
    assert database.query("PRAGMA journal_mode") == [("wal",)]
    assert database.query("PRAGMA synchronous") == [(2,)]
    assert database.query("PRAGMA user_version") == [(SCHEMA_VERSION,)]
    database.close()
    database.close()
    with pytest.raises(Unavailable, match="not open"):
        database.query("SELECT 1")


def test_a_wider_mode_is_taken_back(tmp_path: Path, opened: Opened) -> None:
    """A file that others could read is made private when it is opened."""
    opened(tmp_path / "cp.db").close()
    (tmp_path / "cp.db").chmod(0o644)
    opened(tmp_path / "cp.db").close()
    assert stat.S_IMODE((tmp_path / "cp.db").stat().st_mode) == 0o600


def test_a_database_of_the_released_server_keeps_its_rows(tmp_path: Path, opened: Opened) -> None:
    """Its extra column goes, its agents stay, and they are found by the registry."""
    path = tmp_path / "cp.db"
    old = sqlite3.connect(path)
    old.executescript(
        "CREATE TABLE goose_db_version (id INTEGER PRIMARY KEY, version_id INTEGER);"
        "CREATE TABLE agents (thumbprint_hex TEXT NOT NULL, container_id TEXT NOT NULL, agent_name TEXT NOT NULL,"
        " project TEXT NOT NULL, canonical_cn TEXT NOT NULL, registered_at INTEGER NOT NULL,"
        " last_seen INTEGER NOT NULL,"
        " PRIMARY KEY (thumbprint_hex, container_id), UNIQUE (thumbprint_hex), UNIQUE (container_id));"
        f"INSERT INTO agents VALUES ('{'ab' * 32}', 'c1', 'dev', 'shop', 'clawker-clawkerd', 5, 6);"
    )
    old.close()
    registry = Registry(opened(path))
    (row,) = registry.snapshot()
    assert (row.container_id, row.agent, row.project, row.registered_at) == ("c1", "dev", "shop", 5)


def test_a_database_of_a_later_version_is_refused_untouched(tmp_path: Path, opened: Opened) -> None:
    """The error names both schema versions; the file keeps its bytes."""
    path = tmp_path / "cp.db"
    later = sqlite3.connect(path)
    later.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    later.close()
    before = path.read_bytes()
    with pytest.raises(Conflict, match=f"schema {SCHEMA_VERSION + 1}, this one knows {SCHEMA_VERSION}"):
        opened(path)
    assert path.read_bytes() == before


def test_garbage_is_no_database(tmp_path: Path, opened: Opened) -> None:
    """A file of other content is an error that names it, not an empty registry."""
    path = tmp_path / "cp.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(Unavailable, match=r"cp\.db") as refused:
        opened(path)
    assert "move it away" in (refused.value.hint or "")
    assert path.read_bytes().startswith(b"not a database")


def test_a_failed_transaction_leaves_nothing(tmp_path: Path, opened: Opened) -> None:
    """What ran before the failure is taken back, and a broken constraint is a conflict."""
    database = opened(tmp_path / "cp.db")
    insert = "INSERT INTO oauth_jti VALUES ('one', 'clawker-cli', 1)"
    with pytest.raises(Conflict), database.transaction():
        database.execute(insert)
        database.execute(insert)
    assert database.query("SELECT * FROM oauth_jti") == []


def test_what_was_committed_survives_a_kill(tmp_path: Path, opened: Opened) -> None:
    """A process killed right after a commit has lost nothing of it."""
    script = (
        "import os, signal, sys; from pathlib import Path; from clawker_cp.agents.database import Database\n"
        "d = Database(Path(sys.argv[1])); d.open()\n"
        "d.execute(\"INSERT INTO oauth_jti VALUES ('spent', 'clawker-agent', 9)\")\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "cp.db"
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=60, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert opened(path).query("SELECT jti FROM oauth_jti") == [("spent",)]
