"""Doing one thing in another network namespace."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawker_cp.engines.host.namespaces import in_netns, write_sysctls
from clawker_cp.errors import NotFound

pytestmark = pytest.mark.root


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"cktest-{os.getpid()}-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield Path("/run/netns", name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def current() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_action_runs_inside_and_the_caller_stays_outside(netns: Path) -> None:
    """The action sees the other namespace, its result comes back, and our thread never left its own."""
    before = current()
    assert in_netns(netns, current) == netns.stat().st_ino
    assert current() == before
    assert in_netns(None, current) == before


def test_failure_of_the_action_is_the_callers(netns: Path) -> None:
    """What the action raises arrives unchanged; a missing file of its own is not a missing namespace."""
    with pytest.raises(ZeroDivisionError):
        in_netns(netns, lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):
        in_netns(netns, lambda: Path("/nowhere").read_text())


def test_namespace_that_is_gone_is_named() -> None:
    """A namespace that was removed is told as not found."""
    with pytest.raises(NotFound, match="cktest-gone"):
        in_netns(Path("/run/netns/cktest-gone"), current)


def test_settings_are_those_of_the_namespace_and_unknown_ones_are_told(netns: Path) -> None:
    """A setting is written in the namespace alone; one that this kernel does not have is returned."""
    key = "net/ipv4/ping_group_range"
    outside = Path("/proc/sys", key).read_text()
    assert in_netns(netns, lambda: write_sysctls({key: "7 9", "net/no/such": "1"})) == ["net/no/such"]
    assert in_netns(netns, Path("/proc/sys", key).read_text).split() == ["7", "9"]
    assert Path("/proc/sys", key).read_text() == outside
