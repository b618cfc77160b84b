"""Pinned maps read without a manager, as a real one left them."""

from __future__ import annotations

import errno
import os
import secrets
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawker_cp._fast import bpfmap
from clawker_cp.ebpf import AgentConfig, Manager
from clawker_cp.ebpf.config import InboundFrom, NameRow, mapped
from clawker_cp.ebpf.pins import ERRNOS, Pins
from clawker_cp.errors import InvalidInput, NotFound
from clawker_cp.firewall.plan import TCP, RouteAction, RouteRow
from clawker_cp.testing.socket_world import remove_cgroup
from clawker_cp.testing.world import cgroup2_mount

pytestmark = pytest.mark.root

GATE = "192.0.2.1"


@pytest.fixture
def left() -> Iterator[tuple[Pins, Path]]:
    """Pins of a manager that has gone, and the cgroup of the one agent that it enrolled."""
    name = f"ckp{os.getpid()}-{secrets.token_hex(2)}"
    parent, directory = cgroup2_mount() / name, Path("/sys/fs/bpf") / name
    agent = parent / "agent"
    agent.mkdir(parents=True)
    try:
        manager = Manager(directory, max_agents=64)
        manager.load(parent)
        manager.enroll(agent.stat().st_ino, AgentConfig(3, GATE, GATE, GATE, GATE))
        manager.set_inbound(agent.stat().st_ino, {8080: InboundFrom.HOST})
        later_ns = time.monotonic_ns() + 3600 * 10**9
        manager.update_dns(agent.stat().st_ino, [NameRow(mapped("203.0.113.7"), 300, later_ns)])
        manager.sync_routes([RouteRow(3, 300, 443, TCP, RouteAction.PROXY, 10443)], [], [])
        manager.close()
        yield Pins(directory), agent
    finally:
        Manager(directory).flush(force=True)
        remove_cgroup(agent)
        remove_cgroup(parent)


def per_cpu(pins: Pins, name: str, key: bytes, counts: list[int]) -> None:
    """Give the first processors a count."""
    opened = pins.open(name)
    cpus = bpfmap.possible_cpus()
    every = bpfmap.BpfMap(os.dup(opened.fd), name, opened.key_bytes, 8 * cpus)
    every.put(key, struct.pack(f"={cpus}Q", *counts, *[0] * (cpus - len(counts))))
    every.close()
    opened.close()


def test_what_a_manager_wrote_is_read_without_it(left: tuple[Pins, Path]) -> None:
    """The agent, its names, its routes, who may come in, and how many rows and links there are."""
    pins, agent = left
    cgroup_id = agent.stat().st_ino
    status = pins.status()
    assert (status["container_map"], status["route_map"], status["dns_cache"], status["attached"]) == (1, 1, 1, 0)
    assert status["links"] > 10
    (row,) = pins.containers()
    assert (row["cgroup_id"], row["policy"], row["proxy"], row["own_links"]) == (cgroup_id, 3, GATE, 0)
    (name,) = pins.names()
    assert (name["address"], name["identities"]) == ("203.0.113.7", [300]) and 3500 < name["left_s"] <= 3600
    (route,) = pins.routes()
    assert (route["policy"], route["identity"], route["port"], route["action"]) == (3, 300, 443, "proxy")
    assert {"cgroup_id": cgroup_id, "inbound_port": 8080, "from": "host"} in pins.flows()


def test_a_change_is_one_field_of_one_enrolled_agent(left: tuple[Pins, Path]) -> None:
    """Everything else of its row stays; an agent that nobody enrolled is not made by it."""
    pins, agent = left
    assert pins.change(agent.stat().st_ino, quarantined=True).quarantined
    (row,) = pins.containers()
    assert (row["quarantined"], row["policy"]) == (True, 3)
    with pytest.raises(NotFound, match="cgroup 77 is not enrolled"):
        pins.change(77, quarantined=True)
    assert len(pins.containers()) == 1


def test_counts_of_all_processors_are_one(left: tuple[Pins, Path]) -> None:
    """Errors of helpers by site and errno, without those that never happened."""
    pins, _ = left
    site = (3 * ERRNOS + errno.E2BIG).to_bytes(4, "little")
    counts = [2, 3][: bpfmap.possible_cpus()]
    per_cpu(pins, "error_map", site, counts)
    assert pins.errors() == {"inbound_flow:E2BIG": sum(counts)}
    assert pins.metrics() == []


def test_an_agent_is_found_by_number_path_or_what_is_inside_it(left: tuple[Pins, Path]) -> None:
    """A cgroup inside an agent is judged as the agent; what is neither a cgroup nor enrolled is an error."""
    pins, agent = left
    cgroup_id, root = agent.stat().st_ino, cgroup2_mount()
    inside = agent / "inside"
    inside.mkdir()
    try:
        by_number = pins.resolve(str(cgroup_id), root)
        assert by_number == pins.resolve(str(agent.relative_to(root)), root) == pins.resolve(str(agent), root)
        assert (by_number["enrolled"], by_number["policy"], by_number["judged_as"]) == (True, 3, cgroup_id)
        found = pins.resolve(str(inside), root)
        assert (found["enrolled"], found["judged_as"]) == (False, cgroup_id)
    finally:
        remove_cgroup(inside)
    for wrong in ("1", "no/such", "/no/such"):
        with pytest.raises(NotFound):
            pins.resolve(wrong, root)
    with pytest.raises(InvalidInput):
        pins.resolve("", root)


def test_where_nothing_is_pinned_the_error_says_so(tmp_path: Path) -> None:
    """With the directory, and what may be wrong with it."""
    with pytest.raises(NotFound, match=str(tmp_path)) as raised:
        Pins(tmp_path).containers()
    assert "--pin-dir" in (raised.value.hint or "")
