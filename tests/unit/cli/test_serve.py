"""`serve` before there is a server: what it says to people, and to the process that started it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clawker_cp.cli.main import cli


def serve(tmp_path: Path, settings: str, *options: str) -> tuple[Result, list[dict[str, object]]]:
    """One `serve` with these settings; how it ended, and the lines on its ready descriptor."""
    (tmp_path / "control-plane.yaml").write_text(settings)
    reading, writing = os.pipe()
    where = ("--config-dir", str(tmp_path), "--data-dir", str(tmp_path / "data"), "--log-dir", str(tmp_path / "log"))
    try:
        done = CliRunner().invoke(cli, ["serve", *where, "--ready-fd", str(writing), *options])
        os.set_blocking(reading, False)
        try:
            said = os.read(reading, 65536)
        except BlockingIOError:
            said = b""
            os.close(writing)  # nothing was told, so it is still ours
    finally:
        os.close(reading)
    return done, [json.loads(line) for line in said.splitlines()]


@pytest.mark.parametrize(
    ("settings", "named"),
    [("dns:\n  port: many\n", "dns.port"), ("no_such_key: 1\n", "no_such_key"), ("[", "control-plane.yaml")],
)
def test_settings_that_do_not_hold_are_told_to_both(tmp_path: Path, settings: str, named: str) -> None:
    """One line that names the key, exit code 2, and the same words for who started it."""
    done, lines = serve(tmp_path, settings)
    assert done.exit_code == 2
    assert named in done.stderr.splitlines()[0] and done.stdout == ""
    (line,) = lines
    assert line["ready"] is False and str(line["message"]) in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    """Before anything is read or made."""
    done, lines = serve(tmp_path, "", "--tls-cert", str(tmp_path / "none.pem"))
    assert done.exit_code == 2 and "none.pem" in done.stderr
    assert lines == []


def test_check_prints_the_host_table_and_starts_nothing(tmp_path: Path) -> None:
    """`--check` reads the settings as a start would."""
    done, lines = serve(tmp_path, "", "--check")
    assert "cgroup2" in done.stdout
    assert lines == [] and not (tmp_path / "log").exists()
