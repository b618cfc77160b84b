"""
`clawker-cp serve` on a machine of its own: ready from cold, rules changed until enforced, and what it holds in memory.

Budgets: ready within 2 s; a rule enforced within 25 ms at 10 rules and 100 ms at 1,000 (p99); at most 150 MiB
resident with 100 agents and 1,000 rules. Peers: an empty interpreter with the same libraries imported, which nobody
can go below, and the second start, when certificates and keys exist. Agents are real sandboxes that sleep.
"""

from __future__ import annotations

import asyncio
import compileall
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import clawker_cp
from clawker_cp.testing.machine import Machine, machine_with_world
from clawker_cp.testing.served import Served, serving

pytestmark = [pytest.mark.root, pytest.mark.envoy, pytest.mark.slow, pytest.mark.timeout(900)]
AGENTS, RULES, CHANGES, STARTS = 100, (10, 100, 1000), 102, 5
IMPORTS = "import clawker_cp.app, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"

ADD_RULES = """
rules = [C.Rule(egress=A.EgressRule(dst="h%d.d%d.example" % (n, n % 97), proto="https", port="443", action="allow"))
         for n in range({first}, {count})]
await client.call("PutRules", C.PutRulesRequest(rules=rules))
"""
CHANGE_RULES = """
result["ms"] = []
await client.call("ListRules", C.ListRulesRequest())  # a caller has its connection
async def timed(method, request):
    began = time.perf_counter()
    answer = await client.call(method, request)
    result["ms"].append(1000 * (time.perf_counter() - began))
    return answer
for n in range({rounds}):
    name = "added%d.example" % n
    put = C.PutRulesRequest(rules=[C.Rule(egress=A.EgressRule(dst=name, proto="https", port="443", action="allow"))])
    answer = await timed("PutRules", put)
    assert answer.applied.live
    put.rules[0].egress.path_rules.add(path="/v1", action="allow")
    put.rules[0].egress.path_default = "deny"
    await timed("PutRules", put)
    await timed("DeleteRules", C.DeleteRulesRequest(ids=[answer.outcomes[0].id]))
"""
ADD_AGENTS = """
for number in range({count}):
    await client.call("CreateSandbox", C.CreateSandboxRequest(
        project="bench", agent="a%d" % number, argv=["sleep", "600"], workdir=WORK, auto_remove=True))
result["agents"] = len((await client.call("ListSandboxes", C.ListSandboxesRequest())).sandboxes)
"""
REMOVE_AGENTS = """
for one in (await client.call("ListSandboxes", C.ListSandboxesRequest())).sandboxes:
    await client.call("RemoveSandbox", C.RemoveSandboxRequest(id=one.id, force=True, grace_seconds=1))
"""


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError


async def start(machine: Machine) -> float:
    """Seconds from process start to ready."""
    began = time.perf_counter()
    async with serving(machine):
        return time.perf_counter() - began


async def changes(served: Served, rounds: int) -> str:
    """One rule added, changed and removed, again and again: what a caller waits until it is enforced."""
    said = await served.call(CHANGE_RULES.format(rounds=rounds), timeout_s=300)
    took = sorted(said["ms"])
    return f"p50 {statistics.median(took):.1f} ms, p99 {took[len(took) * 99 // 100]:.1f} ms, {len(took)} changes"


async def measure(found: dict[str, float], lines: list[str], *, once: bool) -> None:
    agents, rules = (2, (10,)) if once else (AGENTS, RULES)
    async with machine_with_world() as machine:
        began = time.perf_counter()
        done = await machine.host.run([sys.executable, "-c", IMPORTS], env=machine.environment)
        found["imports alone, s"] = time.perf_counter() - began
        found["imports alone, MiB"] = int(done.out) / 1024
        if not once:
            found["first start, s"] = await start(machine)
            found["later starts, median, s"] = statistics.median([await start(machine) for _ in range(STARTS)])
        async with serving(machine) as served:
            pid, had = served.process.pid, 0
            found["no agents, no rules, MiB"] = resident_mib(pid)
            for count in rules:
                await served.call(ADD_RULES.format(first=had, count=count))
                had = count
                lines.append(f"rule to enforced at {count} rules: {await changes(served, 1 if once else CHANGES // 3)}")
            found[f"{had} rules, MiB"] = resident_mib(pid)
            said = await served.call(ADD_AGENTS.format(count=agents), timeout_s=600)
            assert said["agents"] == agents
            found[f"{had} rules, {agents} agents, MiB"] = resident_mib(pid)
            if not once:
                lines.append(f"rule to enforced at {had} rules, {agents} agents: {await changes(served, CHANGES // 3)}")
        began = time.perf_counter()
        async with serving(machine) as served:
            found[f"start with {had} rules, {agents} agents, s"] = time.perf_counter() - began
            await served.call(REMOVE_AGENTS, timeout_s=600)


def test_bench_cold_start(benchmark: Any) -> None:
    """Seconds and mebibytes, with their ratios to imports alone; milliseconds until a rule is enforced."""
    benchmark.group = "cold_start, memory"
    found: dict[str, float] = {}
    lines: list[str] = []
    compileall.compile_dir(Path(clawker_cp.__file__).parent, quiet=1)  # as it is where pip installed it
    benchmark.pedantic(lambda: asyncio.run(measure(found, lines, once=not benchmark.enabled)), rounds=1)
    print()
    for name, value in found.items():
        base = found["imports alone, " + name.rsplit(", ", 1)[1]]
        print(f"{name:<36} {value:8.2f}  {value / base:5.2f} x imports alone")
    print(*lines, sep="\n")
