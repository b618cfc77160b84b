"""The control plane's own database, open, for what keeps rows in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clawker_cp.agents.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "cp.db")
    database.open()
    yield database
    database.close()
