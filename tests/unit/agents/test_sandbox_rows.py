"""The history of sandboxes: states move forward, ended ones are kept up to a bound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clawker_cp.agents import sandbox_rows
from clawker_cp.agents.database import Database
from clawker_cp.agents.sandbox_rows import SandboxRow, SandboxRows, SandboxState


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[SandboxRows]:
    database = Database(tmp_path / "cp.db")
    database.open()
    yield SandboxRows(database)
    database.close()


def test_a_sandbox_goes_from_created_to_exited(rows: SandboxRows) -> None:
    """Each step is kept with its time, and the end with its code."""
    rows.put(SandboxRow("s1", "{}", SandboxState.CREATED, 1))
    rows.started("s1", 2)
    rows.finished("s1", 3, 137)
    assert rows.get("s1") == SandboxRow("s1", "{}", SandboxState.EXITED, 1, 2, 3, 137)


def test_one_that_is_being_removed_is_forgotten_by_whoever_sees_its_end(rows: SandboxRows) -> None:
    """A removal that failed and an end that is seen later leave no row; an ended one that stays keeps its own."""
    for name in ("removed", "stays"):
        rows.put(SandboxRow(name, "{}", SandboxState.RUNNING, 1, 2))
    rows.forget_at_end("removed")
    rows.finished("removed", 3, 0)
    rows.finished("stays", 3, 0)
    assert [row.id for row in rows.all()] == ["stays"]


def test_what_ended_unseen_is_settled(rows: SandboxRows) -> None:
    """What ran and does not live has ended; what never began, was half removed or goes with its end is forgotten."""
    plain, brief = '{"extra": {"auto_remove": false}}', '{"extra": {"auto_remove": true}}'
    for name, spec, state in (
        ("lives", plain, SandboxState.RUNNING), ("ended", plain, SandboxState.EXITED),
        ("died", plain, SandboxState.RUNNING), ("half made", plain, SandboxState.CREATED),
        ("brief", brief, SandboxState.RUNNING), ("brief lives", brief, SandboxState.RUNNING),
        ("removed", "{}", SandboxState.RUNNING), ("told", plain, SandboxState.RUNNING),
        ("ended at once", plain, SandboxState.CREATED),
    ):  # fmt: skip
        rows.put(SandboxRow(name, spec, state, 1))
    rows.forget_at_end("removed")
    rows.forget_at_end("nobody")
    rows.settle({"lives", "brief lives"}, 9, {"told": 0, "ended at once": 3}.get)
    found = {row.id: (row.state, row.finished_at, row.exit_code) for row in rows.all()}
    assert found == {
        "lives": (SandboxState.RUNNING, 0, 0), "brief lives": (SandboxState.RUNNING, 0, 0),
        "ended": (SandboxState.EXITED, 0, 0), "died": (SandboxState.EXITED, 9, sandbox_rows.UNKNOWN_END),
        "told": (SandboxState.EXITED, 9, 0), "ended at once": (SandboxState.EXITED, 9, 3),
    }  # fmt: skip


def test_what_ended_late_is_forgotten_if_it_was_to_be(rows: SandboxRows) -> None:
    """Of those that are named, ones that were being removed or go with their end; no other's row is touched."""
    brief = '{"extra": {"auto_remove": true}}'
    for name, spec in (("removed", "{}"), ("brief", brief), ("kept", "{}"), ("other", brief)):
        rows.put(SandboxRow(name, spec, SandboxState.EXITED, 1))
    rows.forget_at_end("removed")
    rows.forget_ended(["removed", "brief", "kept", "nobody"])
    assert {row.id for row in rows.all()} == {"kept", "other"}


def test_an_unknown_sandbox_is_not_made_up(rows: SandboxRows) -> None:
    """Steps of a sandbox that has no row leave none."""
    rows.started("s1", 2)
    rows.finished("s1", 3, 0)
    assert rows.all() == [] and rows.remove("s1") is False


def test_ended_ones_are_bounded_and_running_ones_are_not(rows: SandboxRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the oldest ended rows go; what runs stays."""
    monkeypatch.setattr(sandbox_rows, "KEPT", 2)
    rows.put(SandboxRow("live", "{}", SandboxState.RUNNING, 0))
    for number in range(4):
        rows.put(SandboxRow(f"s{number}", "{}", SandboxState.CREATED, number))
        rows.finished(f"s{number}", 10 + number, 0)
    assert [row.id for row in rows.all()] == ["live", "s2", "s3"]
