"""The manager writes the kernel's maps, finds them again after a restart, and refuses to leave agents open."""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawker_cp._fast import bpfmap
from clawker_cp.ebpf import routes
from clawker_cp.ebpf.config import AgentConfig, NameRow, mapped
from clawker_cp.ebpf.manager import Manager
from clawker_cp.ebpf.names import NAMES_PER_AGENT
from clawker_cp.errors import CapacityExceeded, Conflict
from clawker_cp.firewall.plan import TCP, RouteAction, RouteRow
from clawker_cp.testing.socket_world import remove_cgroup
from clawker_cp.testing.world import cgroup2_mount

pytestmark = pytest.mark.root

AGENT = 4242
CONFIG = AgentConfig(3, "198.51.100.2", "198.51.100.3", "198.51.100.4", "198.51.100.5")
LATER = time.monotonic_ns() + 3600 * 10**9


@pytest.fixture
def place() -> Iterator[tuple[Path, Path]]:
    """A cgroup and a pin directory of this test's own."""
    name = f"ckm{os.getpid()}-{secrets.token_hex(2)}"
    cgroup, pins = cgroup2_mount() / name, Path("/sys/fs/bpf") / name
    cgroup.mkdir()
    try:
        yield cgroup, pins
    finally:
        Manager(pins).flush(force=True)
        remove_cgroup(cgroup)


@pytest.fixture
def manager(place: tuple[Path, Path]) -> Iterator[Manager]:
    """A loaded manager without agents or routes."""
    made = Manager(place[1], max_agents=64)
    assert not made.load(place[0]).adopted
    yield made
    made.close()


def rows(count: int) -> list[RouteRow]:
    return [RouteRow(3, 256 + n, 443, TCP, RouteAction.PROXY, 10443) for n in range(count)]


def test_an_enrolled_agent_reads_back(manager: Manager) -> None:
    """The row is what was enrolled; changes reach it, and only an enrolled agent can be changed."""
    manager.enroll(AGENT, CONFIG)
    manager.set_policy(AGENT, 9)
    manager.quarantine(AGENT, on=True)
    found = manager.agents()[AGENT]
    assert (found.policy, found.quarantined, found.proxy_addr) == (9, True, CONFIG.proxy_addr)
    with pytest.raises(Conflict, match="not enrolled"):
        manager.set_policy(AGENT + 1, 1)


def test_names_stop_at_the_quota(manager: Manager) -> None:
    """One address beyond the quota, or a fifth name of one, is refused whole."""
    full = [NameRow(n.to_bytes(16, "big"), 256, LATER) for n in range(NAMES_PER_AGENT)]
    manager.update_dns(AGENT, full)
    with pytest.raises(CapacityExceeded):
        manager.update_dns(AGENT, [NameRow(mapped("203.0.113.1"), 256, LATER)])
    manager.sync_routes(rows(4), (), ())
    manager.update_dns(AGENT + 1, [NameRow(full[0].addr, 256 + n, LATER) for n in range(4)])
    with pytest.raises(CapacityExceeded, match="four names"):
        manager.update_dns(AGENT + 1, [NameRow(full[0].addr, 300, LATER)])
    assert manager.statistics()["names"] == NAMES_PER_AGENT + 1
    manager.forget_names(AGENT)
    assert manager.statistics()["names"] == 1


def test_few_changes_stay_in_the_generation_and_many_flip_it(manager: Manager) -> None:
    """Up to SMALL changed rows are written in place; one more writes a new generation."""
    small = manager.sync_routes(rows(routes.SMALL), (), ())
    assert (small.changed, small.full, manager.statistics()["generation"]) == (routes.SMALL, False, 0)
    bulk = manager.sync_routes(rows(2 * routes.SMALL + 1), (), ())
    assert (bulk.full, manager.statistics()["generation"]) == (True, 1)


@pytest.mark.slow
def test_what_was_closed_is_adopted(manager: Manager, place: tuple[Path, Path]) -> None:
    """Agents, names, routes and generation are found again after close."""
    manager.enroll(AGENT, CONFIG)
    manager.update_dns(AGENT, [NameRow(mapped("203.0.113.1"), 256, LATER)])
    manager.sync_routes(rows(routes.SMALL + 1), (), ())
    before = manager.statistics()
    manager.close()
    following = Manager(place[1], max_agents=64)
    try:
        report = following.load(place[0])
        assert (report.adopted, report.agents) == (True, 1)
        assert following.statistics() == before
        assert following.sync_routes(rows(routes.SMALL + 1), (), ()).changed == 0
    finally:
        following.close()


def test_a_flush_beside_a_load_takes_all_of_it_away(place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that was given up loads on in its thread: what it made goes with what is flushed meanwhile."""
    load, begun, go_on = Manager._load_object, threading.Event(), threading.Event()

    def gated(manager: Manager, level: int) -> bpfmap.BpfObject:
        begun.set()
        assert go_on.wait(10)
        return load(manager, level)

    monkeypatch.setattr(Manager, "_load_object", gated)
    cgroup, pins = place
    started = Manager(pins, max_agents=64)
    loading = threading.Thread(target=started.load, args=(cgroup,))
    flushing = threading.Thread(target=started.flush)
    loading.start()
    assert begun.wait(10)
    flushing.start()
    flushing.join(0.2)  # as far as it gets
    go_on.set()
    loading.join(10)
    flushing.join(10)

    assert not pins.exists()
    assert not started.loaded


def test_flush_refuses_while_an_agent_lives(manager: Manager, place: tuple[Path, Path]) -> None:
    """A process below the parent keeps enforcement; after its end flush leaves no pin."""
    cgroup, pins = place
    agent = cgroup / "agent"
    agent.mkdir()
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        (agent / "cgroup.procs").write_text(str(process.pid))
        with pytest.raises(Conflict, match="still have processes"):
            manager.flush()
    finally:
        process.communicate()
        remove_cgroup(agent)
    manager.flush()
    assert not pins.exists()
