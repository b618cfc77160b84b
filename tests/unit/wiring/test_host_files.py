"""
Files that a server makes: the bundle, the directories, and the pid file that keeps it alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from clawker_cp.config import Directories
from clawker_cp.errors import Conflict
from clawker_cp.wiring import host_files
from clawker_cp.wiring.host_files import make_directories, take_pid_file, write_bundle


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own places are not touched."""
    monkeypatch.setattr(host_files, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(host_files, "CA_DIRECTORY", tmp_path / "ca")


def test_one_server_holds_the_pid_file(tmp_path: Path) -> None:
    """A second one is told that it may join; when the first lets go the file is free, whatever it says."""
    (tmp_path / "run").mkdir()
    first = take_pid_file()
    with pytest.raises(Conflict) as refused:
        take_pid_file()
    written = (tmp_path / "run" / "cp.pid").read_text()
    first.close()
    take_pid_file().close()

    assert refused.value.code == "ALREADY_RUNNING" and "joins" in (refused.value.hint or "")
    assert written == f"{os.getpid()}\n"


def test_the_bundle_is_roots_and_our_own(tmp_path: Path) -> None:
    """Both files are readable by every user of a sandbox, and nothing half-written stays."""
    roots = tmp_path / "roots.pem"
    roots.write_text("roots\n")
    write_bundle(tmp_path / "bundle", roots, "own\n")
    write_bundle(tmp_path / "bundle", roots, "newer\n")

    assert (tmp_path / "bundle" / "bundle.pem").read_text() == "roots\nnewer\n"
    assert (tmp_path / "bundle" / "ca.pem").read_text() == "newer\n"
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {"bundle.pem", "ca.pem"}
    assert stat.S_IMODE((tmp_path / "bundle" / "ca.pem").stat().st_mode) == 0o644


def test_directories_are_made_once(tmp_path: Path) -> None:
    """Made with what they need, and found again."""
    where = Directories(tmp_path / "config", tmp_path / "data", tmp_path / "state", tmp_path / "cache")
    make_directories(where)
    make_directories(where)

    assert where.firewall.is_dir() and where.state.is_dir() and (tmp_path / "run").is_dir()
