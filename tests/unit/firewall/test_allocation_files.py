"""Allocations on disk, and corrupt tables (contract 1.8, 7.9)."""

from __future__ import annotations

from pathlib import Path

import pytest

from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.allocation_files import ALLOCATIONS_FILE, IDENTITIES_FILE, AllocationFiles
from clawker_cp.firewall.allocations import Allocations
from clawker_cp.firewall.documents import parse_yaml
from clawker_cp.firewall.plan import TCP, UDP

SOME = Allocations(
    policies={"project:p": 2, "agent:p/a": 3},
    next_policy=4,
    listeners={(TCP, "git.example.org", 22): 10001, (UDP, "x@agent:p/a", 53): 11001},
    identities={"git.example.org": 256, "*.x.com": 257},
    next_identity=258,
)


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    """Without the resting numbers and rule indices, which no restart needs."""
    AllocationFiles(tmp_path).save(SOME)
    assert AllocationFiles(tmp_path).load().allocations == SOME


def test_missing_files_are_empty_tables(tmp_path: Path) -> None:
    """The first start."""
    assert AllocationFiles(tmp_path).load().allocations == Allocations()


def test_the_files_are_yaml_in_the_schema_of_the_contract(tmp_path: Path) -> None:
    """entries sorted by dst, and next."""
    AllocationFiles(tmp_path).save(SOME)
    identities = parse_yaml((tmp_path / IDENTITIES_FILE).read_text())
    assert identities == {
        "entries": [{"dst": "*.x.com", "id": 257}, {"dst": "git.example.org", "id": 256}],
        "next": 258,
    }
    others = parse_yaml((tmp_path / ALLOCATIONS_FILE).read_text())
    assert others["policies"] == [{"key": "agent:p/a", "id": 3}, {"key": "project:p", "id": 2}]
    assert others["listeners"][0] == {"l4": 6, "dst": "git.example.org", "port": 22, "listen": 10001}
    assert others["next_policy"] == 4


def test_a_table_in_another_yaml_layout_is_read_too(tmp_path: Path) -> None:
    """Hand edits."""
    (tmp_path / IDENTITIES_FILE).write_text("next: 300\nentries:\n  - dst: a.com\n    id: 256 # kept\n")
    loaded = AllocationFiles(tmp_path).load()
    assert (loaded.allocations.identities, loaded.allocations.next_identity) == ({"a.com": 256}, 300)


@pytest.mark.parametrize(
    "text",
    [
        "entries: [",
        "[]",
        "entries: 5",
        "entries: [5]",
        "entries: [{dst: a}]",
        'entries: [{dst: a, id: "256"}]',
        "entries: [{dst: a, id: true}]",
        "entries: [{dst: a, id: 255}]",
        "entries: [{dst: a, id: 4294967296}]",
        "entries: [{dst: a, id: 256}, {dst: b, id: 256}]",
        "entries: [{dst: a, id: 256}, {dst: a, id: 257}]",
        "entries: [{dst: a, id: 256}]\nnext: 7",
    ],
)
def test_a_corrupt_identity_table_is_set_aside_and_begun_anew(tmp_path: Path, text: str) -> None:
    """Kept as .corrupt; the caller learns that all rows must be rebuilt."""
    (tmp_path / IDENTITIES_FILE).write_text(text)
    loaded = AllocationFiles(tmp_path).load()
    assert loaded.allocations == Allocations()
    assert len(loaded.corrupt) == 1
    assert (tmp_path / (IDENTITIES_FILE + ".corrupt")).read_text() == text
    assert not (tmp_path / IDENTITIES_FILE).exists()


@pytest.mark.parametrize(
    "text",
    [
        "policies: [{key: a, id: 1}]",
        "policies: [{key: a, id: 2}, {key: b, id: 2}]",
        "listeners: [{l4: 6, dst: a, port: 22, listen: 18901}]",
        "listeners: [{l4: 6, dst: a, port: 22, listen: 11001}]",
        "listeners: [{l4: 1, dst: a, port: 22, listen: 10001}]",
        "listeners: [{l4: 6, dst: a, port: 0, listen: 10001}]",
        "listeners: [{l4: 6, dst: a, port: 1, listen: 10001}, {l4: 6, dst: b, port: 1, listen: 10001}]",
        "next_policy: 1002",
    ],
)
def test_so_is_a_corrupt_table_of_policies_and_listeners(tmp_path: Path, text: str) -> None:
    """Numbers out of their band, or given twice."""
    (tmp_path / ALLOCATIONS_FILE).write_text(text)
    loaded = AllocationFiles(tmp_path).load()
    assert (loaded.allocations, len(loaded.corrupt)) == (Allocations(), 1)


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    """A save of the same numbers touches nothing."""
    files = AllocationFiles(tmp_path)
    assert files.save(SOME)
    before = (tmp_path / IDENTITIES_FILE).stat().st_ino
    assert not files.save(SOME)
    assert (tmp_path / IDENTITIES_FILE).stat().st_ino == before


def test_a_failed_save_is_an_error_and_the_next_one_tries_again(tmp_path: Path) -> None:
    """Nothing half written stays."""
    directory = tmp_path / "not-a-directory"
    directory.write_text("")
    files = AllocationFiles(directory)
    with pytest.raises(ClawkerError) as caught:
        files.save(SOME)
    assert caught.value.code == "ROUTE_SYNC"
    directory.unlink()
    assert files.save(SOME)
