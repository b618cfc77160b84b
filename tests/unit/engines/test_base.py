"""Specs of sandboxes as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from clawker_cp.engines.base import Limits, Mount, Publish, Sandbox, SandboxSpec


def test_spec_comes_back_from_json_as_it_was() -> None:
    """Every field survives being written to a record and read again."""
    spec = SandboxSpec(
        project="p", agent="a", argv=("x", "y"), env={"A": "b"}, workdir="/w",
        mounts=(Mount("/s", "/t", read_only=False),),
        uid=5, gid=6, allow_root=True, tty=True, publish=(Publish(1, 2),), capabilities=("chown",), seccomp=False,
        limits=Limits(1, 2, 3), extra={"rules": [1]},
    )  # fmt: skip
    assert SandboxSpec.from_mapping(json.loads(json.dumps(spec.as_mapping()))) == spec


def test_labels_are_those_of_a_container() -> None:
    """A sandbox carries the labels an agent container would, and no project label without a project."""

    for project in ("p", ""):
        spec = SandboxSpec(project=project, agent="a", argv=("x",), workdir="/w")
        labels = Sandbox("1" * 64, spec, "10.0.0.2", "n", "i", Path("/c"), 1, Path("/d")).labels
        assert labels["dev.clawker.purpose"] == "agent"
        assert labels["dev.clawker.engine"] == "host"
        assert labels.get("dev.clawker.project", "") == project
