"""Records of sandboxes on disk."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from clawker_cp.engines.base import Limits, Mount, Publish, Sandbox, SandboxSpec
from clawker_cp.engines.host.records import RECORD, read_record, write_record
from clawker_cp.errors import Unavailable


def sandbox_in(directory: Path) -> Sandbox:
    spec = SandboxSpec(
        project="demo",
        agent="one",
        argv=("/bin/true", "a b"),
        env={"TOKEN": "of the agent"},
        mounts=(Mount("/srv", "/srv", read_only=False),),
        publish=(Publish(0, 8080),),
        capabilities=(),
        limits=Limits(pids=64),
        extra={"rules": ["dns:example.com"], "learn": True},
    )
    return Sandbox(
        id="ab" * 32,
        spec=spec,
        address="198.51.100.7",
        netns="clawker-abababababab",
        interface="ck0-ababababa",
        cgroup_path=Path("/nowhere/clawker-abababababab"),
        cgroup_id=2**40 + 1,
        directory=directory,
        publish=(Publish(40001, 8080),),
        pid=4242,
        started=99,
    )


def test_record_gives_back_the_same_sandbox(tmp_path: Path) -> None:
    """What was written is read back whole, the application's own part and an empty set of capabilities too."""
    written = sandbox_in(tmp_path)
    write_record(written)
    assert read_record(tmp_path) == written


def test_record_is_for_its_owner_only_and_leaves_no_half(tmp_path: Path) -> None:
    """The environment of an agent is readable by nobody else, and no temporary file stays behind."""
    write_record(sandbox_in(tmp_path))
    assert stat.S_IMODE((tmp_path / RECORD).stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [RECORD]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"id": "x"}', '{"id": "x", "spec": 5}'])
def test_faulty_record_is_no_sandbox(tmp_path: Path, text: str | None) -> None:
    """A record that is missing, cut off or of another shape is skipped and does not stop a start."""
    if text is not None:
        (tmp_path / RECORD).write_text(text)
    assert read_record(tmp_path) is None


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A record that cannot be written is told with its path."""
    with pytest.raises(Unavailable, match="gone"):
        write_record(sandbox_in(tmp_path / "gone"))
