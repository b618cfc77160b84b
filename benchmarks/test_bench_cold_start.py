"""
From process start to ready, and what it holds in memory: `clawker-cp serve` on a machine of its own.

Budgets: ready within 2 s; at most 150 MiB resident with 100 agents. Peers: an empty interpreter with the same
libraries imported (what nobody can go below), and the second start, when certificates and keys exist.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.testing.machine import machine_with_world
from clawker_cp.testing.served import serving

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]
AGENTS = 100
IMPORTS = "import clawker_cp.app, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError


async def measure() -> dict[str, float]:
    found: dict[str, float] = {}
    async with machine_with_world() as machine:
        began = time.perf_counter()
        done = await machine.host.run([sys.executable, "-c", IMPORTS], env=machine.environment)
        found["imports alone, s"] = time.perf_counter() - began
        found["imports alone, MiB"] = int(done.out) / 1024
        for name in ("first start, s", "second start, s"):
            began = time.perf_counter()
            async with serving(machine) as served:
                found[name] = time.perf_counter() - began
                found["no agents, MiB"] = resident_mib(served.process.pid)
        async with serving(machine) as served:
            await served.call(
                f"""
for number in range({AGENTS}):
    await client.call("CreateSandbox", C.CreateSandboxRequest(
        project="bench", agent="a%d" % number, argv=["sleep", "600"], workdir=WORK, auto_remove=True))
""",
                timeout_s=300,
            )
            found[f"{AGENTS} agents, MiB"] = resident_mib(served.process.pid)
            await served.call(
                """
for one in (await client.call("ListSandboxes", C.ListSandboxesRequest())).sandboxes:
    await client.call("RemoveSandbox", C.RemoveSandboxRequest(id=one.id, force=True, grace_seconds=1))
""",
                timeout_s=300,
            )
    return found


def test_bench_cold_start(benchmark: Any) -> None:
    """Seconds and mebibytes, with their ratios to imports alone."""
    benchmark.group = "cold_start"
    found: dict[str, float] = {}
    benchmark.pedantic(lambda: found.update(asyncio.run(measure())), rounds=1)
    print()
    for name, value in found.items():
        base = found["imports alone, " + name.rsplit(", ", 1)[1]]
        print(f"{name:<24} {value:8.2f}  {value / base:5.2f} x imports alone")
