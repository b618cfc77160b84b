"""Tests of files on their way to Envoy."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import orjson
import pytest

from clawker_cp.errors import Unavailable
from clawker_cp.firewall.envoy.files import ConfigDirectory, make_directory, replace_file, trim_log, writing_order
from clawker_cp.testing.plan_world import build, rule
from clawker_cp.testing.proxy_config import resources_of


def test_what_cannot_be_written_is_said_and_leaves_the_old(tmp_path: Path) -> None:
    """A file in the place of the directory: CONFIG_REGEN, with the path, and nothing half written."""
    (tmp_path / "envoy").write_text("in the way")
    for write in (
        partial(make_directory, tmp_path / "envoy/sub"),
        partial(replace_file, tmp_path / "envoy/x", b"", 384),
    ):
        with pytest.raises(Unavailable, match=f"{tmp_path}/envoy/.* could not be written") as refused:
            write()
        assert refused.value.code == "CONFIG_REGEN" and refused.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["envoy"]


def test_files_are_replaced_whole_with_rising_versions(tmp_path: Path) -> None:
    """Only what differs is written; secrets are closed to others; unused files go."""
    resources = resources_of(build(rule("https://a.example.com")))
    directory = ConfigDirectory(tmp_path, 100)
    for name in directory.changed(resources.files):
        directory.write(name, resources.files[name])

    assert directory.changed(resources.files) == []
    assert (tmp_path / "sds-p1-0.json").stat().st_mode & 0o777 == 0o600
    assert orjson.loads((tmp_path / "cds.json").read_bytes())["version_info"] == "101"
    assert directory.expected(["cds.json"]) == {"cluster_manager.cds.version_text": "101"}
    directory.forget(["lds.json", "cds.json"])
    assert {path.name for path in tmp_path.iterdir()} == {"lds.json", "cds.json"}
    assert writing_order(["lds.json", "rc_p1_tls.json", "sds-p1-0.json", "cds.json"]) == [
        "cds.json",
        "sds-p1-0.json",
        "rc_p1_tls.json",
        "lds.json",
    ]


def test_a_log_that_grew_too_large_is_put_aside(tmp_path: Path) -> None:
    """A writer that appends goes on in the same, empty file; nothing is trimmed early."""
    path = tmp_path / "envoy.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"x" * 100)
        assert not trim_log(path, 101)
        assert trim_log(path, 100)
        writer.write(b"next")

    assert path.read_bytes() == b"next"
    assert (tmp_path / "envoy.log.1").read_bytes() == b"x" * 100
