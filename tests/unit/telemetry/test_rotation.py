"""
Files that rotate.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from clawker_cp.telemetry.rotation import RotatingFile


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_rotation_keeps_three_backups(tmp_path: Path) -> None:
    """A full file becomes the newest backup, older ones move on, the fourth goes."""
    file = RotatingFile(tmp_path / "f.jsonl", limit_bytes=4)
    for number in range(6):
        file.write(b"%d..\n" % number)
        assert file.full
        file.rotate()
        assert not file.full
        file.compress()
    file.close()

    assert names(tmp_path) == ["f.jsonl", "f.jsonl.1.gz", "f.jsonl.2.gz", "f.jsonl.3.gz"]
    assert [b.read() for b in file.newest_first()] == [b"", b"5..\n", b"4..\n", b"3..\n"]
    assert (tmp_path / "f.jsonl.1.gz").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "f.jsonl").stat().st_mode & 0o777 == 0o640


def test_no_second_rotation_before_the_first_is_packed(tmp_path: Path) -> None:
    """While a rotated file waits to be compressed the next one grows instead of replacing it; a restart packs it."""
    file = RotatingFile(tmp_path / "f", limit_bytes=1)
    file.write(b"a\n")
    file.rotate()
    file.write(b"b\n")

    assert not file.full
    again = RotatingFile(tmp_path / "f", limit_bytes=1)
    assert again.uncompressed
    again.compress()
    assert gzip.decompress((tmp_path / "f.1.gz").read_bytes()) == b"a\n"
    assert [b.read() for b in again.newest_first()] == [b"b\n", b"a\n"]
    file.close()


def test_old_backups_go(tmp_path: Path) -> None:
    """A backup older than the limit is removed."""
    file = RotatingFile(tmp_path / "f", limit_bytes=1, age_s=100, wall=lambda: 1000.0)
    (tmp_path / "f.2.gz").write_bytes(b"")
    os.utime(tmp_path / "f.2.gz", (800, 800))
    (tmp_path / "f.1.gz").write_bytes(b"")
    os.utime(tmp_path / "f.1.gz", (950, 950))

    file.expire()

    assert names(tmp_path) == ["f.1.gz"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A symbolic link in the place of the file is an error, not a way to write elsewhere."""
    (tmp_path / "f").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError):
        RotatingFile(tmp_path / "f").write(b"x\n")
