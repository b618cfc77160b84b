"""
The break-glass tool, on maps that a real manager pinned in a scratch directory.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from clawker_cp.cli.ebpf_manager import cli
from clawker_cp.ebpf import AgentConfig, Manager
from clawker_cp.engines.host.cgroups import find_cgroup2

pytestmark = [pytest.mark.root, pytest.mark.slow]
GATE = "192.0.2.1"


@pytest.fixture
def pins() -> Iterator[tuple[Path, int]]:
    name = f"ckmt{os.getpid()}-{secrets.token_hex(3)}"
    parent = find_cgroup2() / name
    agent = parent / "agent"
    agent.mkdir(parents=True)
    directory = Path("/sys/fs/bpf") / name
    manager = Manager(directory)
    try:
        manager.load(parent)
        manager.enroll(agent.stat().st_ino, AgentConfig(3, GATE, GATE, GATE, GATE))
        yield directory, agent.stat().st_ino
    finally:
        manager.flush(force=True)
        agent.rmdir()
        parent.rmdir()


def run(directory: Path, *arguments: str) -> str:
    result = CliRunner().invoke(cli, ["--pin-dir", str(directory), *arguments])

    assert result.exit_code == 0, result.output
    return result.output


def test_an_enrolled_agent_is_listed_and_a_bypass_counts_down(pins: tuple[Path, int]) -> None:
    """The tool shows an agent's row, gives it a bypass that the kernel times, and ends it."""
    directory, cgroup_id = pins

    before = json.loads(run(directory, "dump-containers", "--json"))
    run(directory, "bypass", str(cgroup_id), "60")
    during = json.loads(run(directory, "dump-containers", "--json"))
    run(directory, "unbypass", str(cgroup_id))
    after = json.loads(run(directory, "dump-containers", "--json"))

    assert [row["cgroup_id"] for row in before] == [cgroup_id]
    assert before[0]["policy"] == 3
    assert before[0]["bypass_s"] == 0
    assert 50 < during[0]["bypass_s"] <= 60
    assert after[0]["bypass_s"] == 0


def test_status_counts_what_is_pinned(pins: tuple[Path, int]) -> None:
    """Status shows the links and the rows of each map."""
    directory, _cgroup_id = pins
    row = json.loads(run(directory, "status", "--json"))[0]

    assert row["links"] == 12
    assert row["container_map"] == 1
    assert run(directory, "dump-routes") == ""
    assert run(directory, "dump-dns") == ""


def test_nothing_pinned_is_said_with_a_hint(tmp_path: Path) -> None:
    """A pin directory without pins is one line and a hint, not a traceback."""
    result = CliRunner().invoke(cli, ["--pin-dir", str(tmp_path), "status"])

    assert result.exit_code == 1
    assert "nothing is pinned" in result.output
