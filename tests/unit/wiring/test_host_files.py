"""
Files that a server makes: the bundle, the directories, and the pid file that keeps it alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from clawker_cp.config import Directories
from clawker_cp.errors import Conflict, Unavailable
from clawker_cp.wiring import host_files
from clawker_cp.wiring.host_files import alone, make_directories, server_runs, take_pid_file, write_bundle


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


def test_a_server_is_seen_by_who_may_only_read(tmp_path: Path) -> None:
    """The pid file says it while it is held, whatever is in it; one that cannot be read is nobody's."""
    path = tmp_path / "run" / "cp.pid"
    path.parent.mkdir()
    seen = [server_runs(path)]
    with take_pid_file():
        seen.append(server_runs(path))
    seen.append(server_runs(path))

    assert seen == [False, True, False]


def test_what_is_done_alone_is_refused_to_a_second_until_it_is_over(tmp_path: Path) -> None:
    """The refusal names who does it; a failure inside lets go too, and a directory that cannot be made is an error."""
    path = tmp_path / "data" / "lock"
    with (
        alone(path, "the work"),
        pytest.raises(Conflict, match=rf"the work is at work already, as process {os.getpid()}"),
    ):
        with alone(path, "the work"):
            pass
    with pytest.raises(ZeroDivisionError), alone(path, "the work"):
        _ = 1 / 0
    with alone(path, "the work"):
        pass
    with pytest.raises(Unavailable, match="cannot write"), alone(path / "below a file", "the work"):
        pass


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
