"""
Sandboxes of the server in numbers: made, adopted by the next server, and removed one by one and all together.

There is no budget. Peer: making one, in the same run; whoever removes waits for the same engine, ring and proxy.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from clawker_cp.testing.machine import machine_with_world
from clawker_cp.testing.served import serving

pytestmark = [pytest.mark.root, pytest.mark.envoy, pytest.mark.slow, pytest.mark.timeout(900)]
COUNT = 100

MAKE = """
began = time.perf_counter()
for number in range({count}):
    await client.call("CreateSandbox", C.CreateSandboxRequest(
        project="bench", agent="a%d" % number, argv=["sleep", "600"], workdir=WORK, auto_remove=True))
result["s"] = time.perf_counter() - began
"""
REMOVE = """
ids = [one.id for one in (await client.call("ListSandboxes", C.ListSandboxesRequest())).sandboxes]
assert len(ids) == {count}, len(ids)
async def remove(one):
    await client.call("RemoveSandbox", C.RemoveSandboxRequest(id=one, force=True))
half = len(ids) // 2
began = time.perf_counter()
for one in ids[:half]:
    await remove(one)
result["one by one"] = (time.perf_counter() - began) / half
began = time.perf_counter()
async with asyncio.TaskGroup() as group:
    for one in ids[half:]:
        group.create_task(remove(one))
result["together"] = (time.perf_counter() - began) / (len(ids) - half)
assert not (await client.call("ListSandboxes", C.ListSandboxesRequest())).sandboxes
"""


async def measure(count: int) -> dict[str, float]:
    """Seconds for each sandbox, by what is done."""
    found: dict[str, float] = {}
    async with machine_with_world() as machine:
        began = time.perf_counter()
        async with serving(machine) as served:
            alone = time.perf_counter() - began
            found["made, one by one"] = (await served.call(MAKE.format(count=count), timeout_s=600))["s"] / count
        began = time.perf_counter()
        async with serving(machine) as served:
            found["adopted at a start"] = (time.perf_counter() - began - alone) / count
            said = await served.call(REMOVE.format(count=count), timeout_s=600)
            found |= {f"removed, {how}": value for how, value in said.items()}
    return found


def test_bench_sandbox_ends(benchmark: Any) -> None:
    """Milliseconds for each sandbox, with the ratio to making one."""
    benchmark.group = "sandbox_ends"
    found: dict[str, float] = {}
    count = COUNT if benchmark.enabled else 2
    benchmark.pedantic(lambda: found.update(asyncio.run(measure(count))), rounds=1)
    base = found["made, one by one"]
    print()
    for name, value in found.items():
        print(f"{name:<24} {1000 * value:8.1f} ms  {value / base:5.2f} x making one")
