"""The registry: one row per container, one certificate per row, and never a short list."""

from __future__ import annotations

from dataclasses import replace

import pytest
import structlog

from clawker_cp.agents.database import Database
from clawker_cp.agents.registry import MalformedRow, RegisteredAgent, Registry
from clawker_cp.errors import Conflict, InvalidInput, Unavailable

ROW = RegisteredAgent("ab" * 32, "c1", "dev", "shop", 100, 100)


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)


def test_a_row_is_found_by_its_container(registry: Registry) -> None:
    """What was added is found, what was not is None."""
    registry.add(ROW)
    assert registry.find("c1") == ROW
    assert registry.find("c2") is None


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (replace(ROW, thumbprint="0" * 64), "thumbprint is zero"),
        (replace(ROW, thumbprint="AB" * 32), "not 64 hex"),
        (replace(ROW, container_id=""), "container id is empty"),
        (replace(ROW, agent=""), "name is empty"),
        (replace(ROW, registered_at=0), "time is zero"),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused(registry: Registry, row: RegisteredAgent, problem: str) -> None:
    """Zero thumbprints, empty names and zero times never get in."""
    with pytest.raises(InvalidInput, match=problem):
        registry.add(row)
    assert registry.snapshot() == []


def test_one_certificate_and_one_container_once(registry: Registry) -> None:
    """Neither a second row of a container nor one of a certificate is taken."""
    registry.add(ROW)
    with pytest.raises(Conflict):
        registry.add(replace(ROW, container_id="c2"))
    with pytest.raises(Conflict):
        registry.add(replace(ROW, thumbprint="cd" * 32))


def test_a_snapshot_is_ordered_and_leaves_malformed_rows_out(registry: Registry, database: Database) -> None:
    """Ordered by project and agent; a malformed row is logged, and an error when looked up."""
    registry.add(replace(ROW, thumbprint="cd" * 32, container_id="c2", project="zoo", agent="a"))
    registry.add(ROW)
    database.execute("INSERT INTO agents VALUES ('nothex', 'bad', 'x', 'a', 1, 1)")
    with structlog.testing.capture_logs() as logs:
        assert [row.container_id for row in registry.snapshot()] == ["c1", "c2"]
    assert [line["event"] for line in logs] == ["agentregistry_row_skipped"]
    with pytest.raises(MalformedRow):
        registry.find("bad")
    assert registry.evict("bad") is True and registry.find("bad") is None


def test_a_read_error_is_never_an_empty_list(registry: Registry, database: Database) -> None:
    """With the table gone the snapshot raises."""
    database.execute("DROP TABLE agents")
    with pytest.raises(Unavailable):
        registry.snapshot()


def test_last_seen_only_moves_forward(registry: Registry) -> None:
    """An older frame does not turn the clock back."""
    registry.add(ROW)
    registry.seen("c1", 150)
    registry.seen("c1", 120)
    row = registry.find("c1")
    assert row is not None and row.last_seen == 150


def test_rows_of_containers_that_are_gone_are_evicted(registry: Registry) -> None:
    """Only what still exists is kept."""
    registry.add(ROW)
    registry.add(replace(ROW, thumbprint="cd" * 32, container_id="c2"))
    assert registry.keep_only({"c2", "c3"}) == ["c1"]
    assert [row.container_id for row in registry.snapshot()] == ["c2"]


def test_an_announced_leaf_replaces_the_registered_one_once(registry: Registry) -> None:
    """The announced thumbprint is taken once and before its end; any other is not."""
    new = "ef" * 32
    registry.add(ROW)
    assert registry.take_renewal("c1", new, 200) is False
    registry.announce_renewal("c1", new, 300)
    assert registry.take_renewal("c1", "cd" * 32, 200) is False
    assert registry.take_renewal("c1", new, 300) is False
    assert registry.take_renewal("c1", new, 200) is True
    assert registry.take_renewal("c1", new, 200) is False
    row = registry.find("c1")
    assert row is not None and (row.thumbprint, row.last_seen) == (new, 200)
    with pytest.raises(InvalidInput):
        registry.announce_renewal("c1", "0" * 64, 300)
