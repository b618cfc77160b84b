"""
What it takes to attach a container that is not below the agents' parent: the first at its level, which loads
the programs, and the later ones; with an idle host and with two hundred attached already. And where the time goes.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import pytest

from clawker_cp._fast import bpfmap
from clawker_cp.ebpf import Manager
from clawker_cp.ebpf.attachments import ATTACH
from clawker_cp.testing.bpf_abi import OBJECTS
from clawker_cp.testing.socket_world import remove_cgroup
from clawker_cp.testing.world import cgroup2_mount

pytestmark = pytest.mark.root

ROUNDS = 200


class Engine:
    """Makes cgroups as an engine does, all of them gone at the end."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.count = 0

    def cgroup(self, *above: str) -> Path:
        self.count += 1
        made = self.base.joinpath(*above, f"box{self.count}")
        made.mkdir(parents=True)
        return made


@pytest.fixture
def place() -> Iterator[tuple[Manager, Engine]]:
    name = f"ckbench{os.getpid()}-{secrets.token_hex(3)}"
    base = cgroup2_mount() / name
    (base / "parent").mkdir(parents=True)
    manager = Manager(Path("/sys/fs/bpf") / name)
    try:
        manager.load(base / "parent")
        yield manager, Engine(base)
    finally:
        manager.flush(force=True)
        for directory, _names, _files in os.walk(base, topdown=False):
            remove_cgroup(Path(directory))


def milliseconds(nanoseconds: list[int], part: float) -> float:
    ordered = sorted(nanoseconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] / 1e6


def timed(manager: Manager, cgroup: Path) -> int:
    began = perf_counter_ns()
    manager.attach(cgroup)
    return perf_counter_ns() - began


def test_bench_container_attach(benchmark: Any, place: tuple[Manager, Engine]) -> None:
    """The first container at a level that nobody had, then later ones while more and more are attached."""
    manager, engine = place
    benchmark.group = "attach a container"
    first = timed(manager, engine.cgroup())  # one level above those of the parent and below
    took: list[int] = []
    benchmark.pedantic(
        lambda cgroup: took.append(timed(manager, cgroup)),
        setup=lambda: ((engine.cgroup("engine"),), {}),
        rounds=ROUNDS,
    )
    again = [timed(manager, engine.base / "engine" / f"box{number}") for number in range(2, 2 + len(took))]
    print(f"\nfirst at its level  {first / 1e6:8.2f} ms")
    for what, values in (("later ones", took), ("the same again", again)):
        print(f"{what:<18}  p50 {milliseconds(values, 0.5):6.3f} ms  p99 {milliseconds(values, 0.99):6.3f} ms")


def test_bench_where_the_time_goes(benchmark: Any, place: tuple[Manager, Engine]) -> None:
    """Twelve links, each made, pinned and unpinned on its own."""
    _manager, engine = place
    benchmark.group = "attach a container, by step"
    pins = Path("/sys/fs/bpf") / f"ckbench{os.getpid()}-{secrets.token_hex(3)}"
    pins.mkdir()
    loaded = bpfmap.BpfObject.load(str(OBJECTS / "clawker.bpf.o"), pin_dir=None, agent_level=3, max_agents=64)
    steps: dict[str, list[int]] = {"link": [], "pin": [], "unpin": []}

    def once(descriptor: int) -> None:
        spent = dict.fromkeys(steps, 0)
        for name, attach_type in ATTACH:
            program, path = loaded.program_fd(name), pins / name
            at = [perf_counter_ns()]
            link = bpfmap.attach(program, descriptor, attach_type)
            at.append(perf_counter_ns())
            bpfmap.pin(link, str(path))
            at.append(perf_counter_ns())
            os.close(link)
            path.unlink()
            at.append(perf_counter_ns())
            for step, began, ended in zip(steps, at, at[1:], strict=False):
                spent[step] += ended - began
        os.close(descriptor)
        for step, value in spent.items():
            steps[step].append(value)

    try:
        benchmark.pedantic(
            once, setup=lambda: ((os.open(engine.cgroup("engine"), os.O_RDONLY),), {}), rounds=50, warmup_rounds=1
        )
    finally:
        loaded.close()
        pins.rmdir()
    print()
    for step, values in steps.items():
        print(f"12 x {step:<6} p50 {milliseconds(values, 0.5):6.3f} ms  p99 {milliseconds(values, 0.99):6.3f} ms")
