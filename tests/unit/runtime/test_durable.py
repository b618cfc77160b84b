"""Files replaced whole, and locks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from clawker_cp.errors import DeadlineExceeded
from clawker_cp.runtime.durable import exchange, locked, write_durably


def test_a_file_is_replaced_with_its_mode(tmp_path: Path) -> None:
    """By rename: a reader that has it open keeps the old one."""
    path = tmp_path / "deep" / "file"
    write_durably(path, b"one", 0o600)
    with path.open("rb") as reader:
        write_durably(path, b"two", 0o644)
        assert reader.read() == b"one"
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two", 0o644)
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    """A directory in its place cannot be replaced."""
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_durably(tmp_path / "file", b"x")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_that_another_process_holds_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    """And taken as soon as it is free."""
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin and holder.stdout
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DeadlineExceeded, match="holds the lock"), locked(path, time.monotonic() + 0.15):
            pass
        holder.stdin.close()
        with locked(path, time.monotonic() + 10):
            assert holder.wait(10) == 0
    finally:
        holder.kill()
        holder.wait(10)
        holder.stdin.close()
        holder.stdout.close()


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    """Whatever happened inside."""
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock", 0.0):
        raise ZeroDivisionError
    with locked(tmp_path / "lock", 0.0):
        pass


def test_two_directories_change_places_in_one_step(tmp_path: Path) -> None:
    """What was in one is in the other; a missing one leaves both as they were."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    exchange(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "old" / "file").read_text() == "new"
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "old", tmp_path / "missing")
    assert (tmp_path / "old" / "file").read_text() == "new"
