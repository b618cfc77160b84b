"""
What a connect() pays: without a program, with one that decides nothing, and with ours.

Datagram sockets connect again and again, so that no handshake hides the hook. Budget: over the
empty program 80 ns without a record, 150 ns with one. "Counted only" is the same decision with the
second's budget of records spent: what is over it in the row below is the record itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawker_cp._fast import bpfmap
from clawker_cp.firewall.plan import UDP
from clawker_cp.testing.bpf_abi import OBJECTS
from clawker_cp.testing.socket_world import GATEWAY, OTHER, TARGET, Actor, SocketWorld, remove_cgroup

pytestmark = pytest.mark.root

CALLS = 2000
UNLIMITED = (10**9, 10**9, 10**9)
SPENT = (1, 1, 1)  # records a second: all but the first are counted and not written
Dial = Callable[[str, str, int], float]


@pytest.fixture(scope="module")
def world() -> Iterator[SocketWorld]:
    with SocketWorld() as made:
        made.reset()
        yield made


@pytest.fixture(scope="module")
def dial(world: SocketWorld) -> Iterator[Dial]:
    """Connect CALLS times as "none", "empty" or "ours" and return nanoseconds a call."""
    ours = world.agent()
    world.knows(ours, TARGET, 300)
    world.route(300, 5000, UDP, 11001)
    world.cidr(f"{OTHER}/32", UDP, 5000)
    world.apply()
    with empty_programs(world.bystander().cgroup) as cgroup:
        actors = {"none": world.bystander(), "empty": Actor(cgroup, world.agents_ns), "ours": ours}
        handles: dict[tuple[str, int], int] = {}

        def often(who: str, addr: str, port: int) -> float:
            family = socket.AF_INET6 if ":" in addr else socket.AF_INET
            handle = handles.setdefault((who, family), 0) or actors[who].udp(family)
            handles[who, family] = handle
            return float(actors[who]("connect_often", handle, addr, port, CALLS))

        try:
            yield often
        finally:
            actors["empty"].close()


@contextlib.contextmanager
def empty_programs(beside: Path) -> Iterator[Path]:
    """A cgroup with the programs of bpf/tests/empty.bpf.c."""
    cgroup = beside / "empty"
    cgroup.mkdir()
    loaded = bpfmap.BpfObject.load(str(OBJECTS / "empty.bpf.o"), pin_dir=None, agent_level=1, max_agents=64)
    directory = os.open(cgroup, os.O_RDONLY)
    links = [
        bpfmap.attach(loaded.program_fd(name), directory, number)
        for name, number in (("empty_connect4", 10), ("empty_connect6", 11))
    ]
    try:
        yield cgroup
    finally:
        for descriptor in (*links, directory):
            os.close(descriptor)
        loaded.close()
        remove_cgroup(cgroup)


@pytest.mark.parametrize("who", ["none", "empty", "ours"])
@pytest.mark.parametrize(
    ("where", "addr", "port", "budget"),
    [
        pytest.param("loopback, no record", "127.0.0.1", 9000, UNLIMITED, id="loopback"),
        pytest.param("loopback, no record, IPv6", "::1", 9000, UNLIMITED, id="loopback6"),
        pytest.param("address rule, counted only", OTHER, 5000, SPENT, id="address-counted"),
        pytest.param("address rule, record", OTHER, 5000, UNLIMITED, id="address"),
        pytest.param("redirected to a listener, counted only", TARGET, 5000, SPENT, id="redirect-counted"),
        pytest.param("redirected to a listener, record", TARGET, 5000, UNLIMITED, id="redirect"),
    ],
)
def test_connect(
    benchmark: Any, world: SocketWorld, dial: Dial, who: str, where: str, addr: str, port: int, budget: tuple[int, ...]
) -> None:
    """One round is CALLS connects in another process; its own clock is in extra_info, nanoseconds a call."""
    benchmark.group = f"connect: {where}"
    world.switch(budget=budget)
    if who != "ours" and addr == TARGET:
        addr, port = GATEWAY, 11001
    took: list[float] = []
    benchmark.pedantic(
        lambda: took.append(dial(who, addr, port)), rounds=20, warmup_rounds=1, setup=lambda: drained(world)
    )
    benchmark.extra_info["ns_per_connect"] = round(min(took))


def drained(world: SocketWorld) -> None:
    """The ring is empty, so that every decision of the round finds room for its record."""
    world.manager.drain_events(65536)
