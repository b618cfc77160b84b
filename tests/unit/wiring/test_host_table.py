"""
The preflight table: what is there, what is missing, what that costs.
"""

from __future__ import annotations

import os
from pathlib import Path

from clawker_cp.config import Directories, load_settings
from clawker_cp.wiring.host_table import preflight


def table(tmp_path: Path, **overrides: str) -> dict[str, tuple[bool, bool, str]]:
    directories = Directories(tmp_path, tmp_path, tmp_path, tmp_path)
    settings = load_settings(directories, {f"CLAWKER_CP_{name}": value for name, value in overrides.items()})
    return {row.name: (row.present, row.required, row.need) for row in preflight(settings)}


def test_what_is_missing_says_what_is_needed(tmp_path: Path) -> None:
    """A pin directory that is on no BPF file system and an Envoy that is not there are required rows with a fix."""
    rows = table(tmp_path, FIREWALL__PIN_DIR="/tmp/nowhere/clawker", ENVOY__BINARY="/nonexistent/envoy")

    assert rows["bpffs"] == (False, True, "mount -t bpf bpf /tmp/nowhere")
    assert rows["envoy"][:2] == (False, True)
    assert rows["root"][0] is (os.geteuid() == 0)


def test_the_ring_is_required_unless_it_is_switched_off(tmp_path: Path) -> None:
    """Without the ring as a setting its row is told, and stops nothing."""
    assert table(tmp_path)["host ring"][1] is True
    assert table(tmp_path, FIREWALL__HOST_RING="false")["host ring"][1] is False
