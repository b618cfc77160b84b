"""
From the engine's start event to enforcement, and what 200 containers leave behind.

Until a container is enrolled the ring passes none of its frames and its cgroup, once linked, is denied: the time is
how long it has no network, not how long it is open. Peer: how long the engine itself takes to start a container.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from typing import Any

import pytest

from clawker_cp.engines.dockerevents import parse_event
from clawker_cp.testing.docker_load import Kept, come_and_go, kept, latencies_s
from clawker_cp.testing.docker_machine import DockerMachine, docker_machine
from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.served import serving

pytestmark = [
    pytest.mark.root, pytest.mark.docker, pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip
COUNT = int(os.environ.get("CLAWKER_BENCH_CONTAINERS", "200"))


async def _starts(machine: DockerMachine, started_ns: dict[str, int]) -> None:
    async with machine.docker.client.events() as stream:
        async for raw in stream:
            event = parse_event(raw)
            if event.kind == "container" and event.action == "start":
                started_ns[event.id] = event.time_ns


async def measure(count: int) -> tuple[list[float], float, Kept, Kept]:
    async with docker_machine() as machine:
        began = time.perf_counter()
        for number in range(min(count, 10)):
            container = await machine.docker.run(f"plain{number}", "sleep", "60")
            await machine.docker.client.remove(container, force=True)
        plain = (time.perf_counter() - began) / min(count, 10)
        async with serving(machine.machine) as served, asyncio.TaskGroup() as group:
            started_ns: dict[str, int] = {}
            watching = group.create_task(_starts(machine, started_ns))
            await come_and_go(machine, min(count, 8))
            before = await kept(machine, served)
            ids = await come_and_go(machine, count)
            after = await kept(machine, served)
            watching.cancel()
        return latencies_s(machine, ids, started_ns), plain, before, after


def test_bench_docker_enrol(benchmark: Any) -> None:
    """Milliseconds from start event to enrolled, p50 and p99, beside the engine's own start and removal."""
    benchmark.group = "docker_enrol"
    results: list[tuple[list[float], float, Kept, Kept]] = []
    count = COUNT if benchmark.enabled else 2
    benchmark.pedantic(lambda: results.append(asyncio.run(measure(count))), rounds=1)
    found, plain, before, after = results[0]
    p50, p99 = statistics.median(found), found[max(0, int(len(found) * 0.99) - 1)]
    print(f"\nstart event to enrolled, {len(found)} containers: p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms")
    print(f"the engine's own start and removal: {plain * 1e3:.0f} ms; enrolment is {p50 / plain:.2f} of it")
    print(f"kept before {before}\nkept after  {after}")
