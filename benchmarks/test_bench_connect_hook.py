"""
What a connect() pays: without a program, with one that decides nothing, and with ours.

Datagram sockets connect again and again, so that no handshake hides the hook; TCP connects, accepts and closes.
The loop is C (`connect_loop.c`) in a process per peer; short rounds of all peers alternate, so that what else the
machine does hits them alike, and the low decile is compared. Budget: over the empty program 80 ns without a record,
150 ns with one. "Counted only" is the same decision with the second's budget of records spent.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hook_world import Loop, compiled

from clawker_cp._fast import bpfmap
from clawker_cp.firewall.plan import TCP, UDP
from clawker_cp.testing.bpf_abi import OBJECTS
from clawker_cp.testing.socket_world import GATEWAY, OTHER, TARGET, TARGET6, SocketWorld, remove_cgroup

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("cc") is None, reason="the loop is C: no compiler (Debian: gcc)"),
]

TIMES, ROUNDS = 1000, 200
UNLIMITED = (10**9, 10**9, 10**9)
SPENT = (1, 1, 1)  # records a second: all but the first are counted and not written
NEAR = "203.0.113.99"  # an address of the agents' own namespace that a rule opens: TCP stays on this machine
BUDGET_NS = {"no record": 80, "counted": 80, "record": 150}
PEERS = ("none", "empty", "ours")


@pytest.fixture(scope="module")
def world() -> Iterator[SocketWorld]:
    with SocketWorld() as made:
        made.reset()
        yield made


@pytest.fixture(scope="module")
def loops(world: SocketWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Loop]]:
    """A loop without programs, one with empty ones, and one that is an agent."""
    program = compiled(tmp_path_factory.mktemp("loop"))
    agent, outsider = world.agent(), world.bystander()
    world.configure(agent, ipv6=True, proxy_addr=GATEWAY)
    world.knows(agent, TARGET, 300)
    world.route(300, 5000, UDP, 11001)
    world.cidr(f"{OTHER}/32", UDP, 5000)
    world.cidr(f"{TARGET6}/128", UDP, 5000)
    world.cidr(f"{NEAR}/32", TCP, 5001)
    world.apply()
    subprocess.run(
        ["nsenter", f"--net=/proc/{world.agents_ns}/ns/net", "ip", "addr", "add", f"{NEAR}/32", "dev", "lo"], check=True
    )
    with contextlib.ExitStack() as stack:
        cgroups = {
            "none": outsider.cgroup,
            "empty": stack.enter_context(empty_programs(outsider.cgroup)),
            "ours": agent.cgroup,
        }
        made = {who: Loop(program, cgroup, world.agents_ns) for who, cgroup in cgroups.items()}
        for loop in made.values():
            stack.callback(loop.close)
        yield made


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


@pytest.mark.parametrize(
    ("kind", "where", "addr", "port", "budget"),
    [
        pytest.param("udp", "loopback, no record", "127.0.0.1", 9000, UNLIMITED, id="loopback"),
        pytest.param("udp", "loopback, no record, IPv6", "::1", 9000, UNLIMITED, id="loopback6"),
        pytest.param("udp", "address rule, counted only", OTHER, 5000, SPENT, id="address-counted"),
        pytest.param("udp", "address rule, record", OTHER, 5000, UNLIMITED, id="address"),
        pytest.param("udp", "address rule, record, IPv6", TARGET6, 5000, UNLIMITED, id="address6"),
        pytest.param("udp", "redirected to a listener, counted only", TARGET, 5000, SPENT, id="redirect-counted"),
        pytest.param("udp", "redirected to a listener, record", TARGET, 5000, UNLIMITED, id="redirect"),
        pytest.param("tcp", "TCP connect+accept+close, loopback", "127.0.0.1", 5001, UNLIMITED, id="tcp-loopback"),
        pytest.param("tcp", "TCP connect+accept+close, loopback, IPv6", "::1", 5001, UNLIMITED, id="tcp-loopback6"),
        pytest.param("tcp", "TCP connect+accept+close, record", NEAR, 5001, UNLIMITED, id="tcp"),
    ],
)
def test_connect(
    benchmark: Any,
    world: SocketWorld,
    loops: dict[str, Loop],
    kind: str,
    where: str,
    addr: str,
    port: int,
    budget: tuple[int, int, int],
) -> None:
    """The three peers in turns; figures are nanoseconds a call by the loop's own clock."""
    benchmark.group = "connect_hook"
    world.switch(budget=budget)
    times = TIMES if kind == "udp" else TIMES // 20
    took: dict[str, list[float]] = {who: [] for who in PEERS}
    failures = dict.fromkeys(PEERS, 0)

    def turn() -> None:
        for number, (who, loop) in enumerate(loops.items()):
            # Ours and nobody's have one port each, so that the second to listen finds it free.
            there = (
                (GATEWAY, 11001)
                if who != "ours" and addr == TARGET
                else (addr, port + number * (kind == "tcp" and addr != NEAR))
            )
            if kind == "tcp" and addr == NEAR and who != "ours":
                there = (addr, port + 1 + number)
            nanoseconds, failed = loop(kind, *there, times)
            took[who].append(nanoseconds)
            failures[who] += failed
        drained(world)

    rounds = ROUNDS if benchmark.enabled else 1
    benchmark.pedantic(turn, rounds=rounds, warmup_rounds=1 if benchmark.enabled else 0)
    low = {who: statistics.quantiles(took[who], n=10)[0] if len(took[who]) > 1 else took[who][0] for who in PEERS}
    benchmark.extra_info.update({f"{who}_ns": round(value) for who, value in low.items()})
    over = low["ours"] - low["empty"]
    middle = statistics.median(took["ours"]) - statistics.median(took["empty"])
    print(
        f"\n{where:<42} none {low['none']:7.0f}  empty {low['empty']:7.0f}  ours {low['ours']:7.0f} ns: "
        f"{low['ours'] / low['empty']:5.2f} x empty, +{over:4.0f} ns (medians +{middle:4.0f})"
    )
    assert failures == dict.fromkeys(PEERS, 0)


def drained(world: SocketWorld) -> None:
    """The ring is empty, so that every decision of the round finds room for its record."""
    while world.manager.drain_events(65536):
        pass
