"""Exit codes that outlive the process that learned them."""

from __future__ import annotations

from pathlib import Path

import pytest

from clawker_cp.engines.host import endings
from clawker_cp.engines.host.endings import Endings


def another(directory: Path) -> Endings:
    """What a later process knows."""
    later = Endings(directory)
    later.load()
    return later


def test_a_code_is_known_to_a_later_process(tmp_path: Path) -> None:
    """Also the code 0 is one; what nobody ended is None."""
    codes = another(tmp_path / "endings")
    codes.put("one", 0)
    codes.put("two", 7)
    later = another(tmp_path / "endings")
    assert [later.get(name) for name in ("one", "two", "three")] == [0, 7, None]


def test_the_first_word_for_an_end_counts(tmp_path: Path) -> None:
    """Whoever comes later and knows less does not overwrite it."""
    codes = Endings(tmp_path)
    codes.put("one", 9)
    codes.put("one", 137)
    assert (codes.get("one"), another(tmp_path).get("one")) == (9, 9)


def test_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the oldest go, from memory and from disk, also those of an earlier process."""
    monkeypatch.setattr(endings, "KEPT", 2)
    for name in ("a", "b", "c"):
        another(tmp_path).put(name, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c"}
    assert [another(tmp_path).get(name) for name in ("a", "b", "c")] == [None, 1, 1]


@pytest.mark.parametrize("content", [b"", b"\xff", b"seven", b"1\n2", b"9" * 5000])
def test_a_file_that_holds_no_code_is_taken_away(tmp_path: Path, content: bytes) -> None:
    """Half a file of a killed process is nobody's end, and the code can be kept again."""
    (tmp_path / "one").write_bytes(content)
    codes = another(tmp_path)
    assert codes.get("one") is None and not (tmp_path / "one").exists()
    codes.put("one", 3)
    assert another(tmp_path).get("one") == 3


def test_a_code_that_cannot_be_written_is_known_here(tmp_path: Path) -> None:
    """An end is told by the process that saw it whatever the disk says."""
    (tmp_path / "file").touch()
    codes = Endings(tmp_path / "file")
    codes.put("one", 4)
    assert codes.get("one") == 4


def test_something_that_is_no_file_ends_nothing(tmp_path: Path) -> None:
    """A directory among the files is left alone."""
    (tmp_path / "one").mkdir()
    assert another(tmp_path).get("one") is None
