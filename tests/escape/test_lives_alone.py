"""
Techniques around the server's own death and its bounds: each test starts a server of its own.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from clawker_cp.testing.escapes import DATABASE, DATAGRAMS, GOING_ON, START
from clawker_cp.testing.machine import Machine, machine_with_world
from clawker_cp.testing.served import serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[Machine]:
    async with machine_with_world() as made:
        yield made


async def bypass_left(machine: Machine) -> float:
    """Seconds of bypass that the kernel's row still has, asked of the pins."""
    done = await machine.host.run(
        [sys.executable, "-m", "clawker_cp.cli.ebpf_manager", "dump-containers", "--json"], env=machine.environment
    )
    return float(json.loads(done.out)[0]["bypass_s"])


async def test_a_bypass_ends_on_time_with_the_server_dead(machine: Machine) -> None:
    """Row 9, I3: the server is killed during a bypass; after its deadline nothing of the agent's sockets arrives."""
    async with serving(machine) as first:
        said = await first.call(
            START
            + f"""
sandbox, stream = await start("dead", {GOING_ON!r})
lines = Lines(stream)
await client.call("FirewallBypass", A.FirewallBypassRequest(container_id=sandbox.id, timeout_seconds=3))
await lines.until("sent")
result["id"] = sandbox.id
"""
        )
        await first.stop(signal.SIGKILL)
        assert said["id"]
        sent = [p for p in await machine.world.packets() if p.get("dst") in {DATABASE, DATAGRAMS}]
        async with asyncio.timeout(30):
            while await bypass_left(machine) > 0:  # the kernel's own clock, and nobody's but the kernel's
                pass
    await machine.world.reset()
    async with serving(machine) as second:
        seen = await second.call(
            f"""
sessions = (await client.call("ListSessions", C.ListSessionsRequest())).sessions
result["bypass"] = sessions[0].bypass_until_unix
await client.call("RemoveSandbox", C.RemoveSandboxRequest(id="{said["id"]}", force=True, grace_seconds=1))
"""
        )
        # Once the drain has taken the address translation away, the host itself refuses what the other end repeats.
        late = [p for p in await machine.world.packets() if p.get("dst") in {DATABASE, DATAGRAMS}]
    assert sent and seen["bypass"] == 0
    assert late == []


async def test_slots_run_out_closed(machine: Machine) -> None:
    """Row 27: with every slot taken another agent is refused, not let run; a free slot is used again."""
    environment = machine.environment
    environment["CLAWKER_CP_FIREWALL__MAX_AGENTS"] = "2"
    try:
        async with serving(machine) as served:
            said = await served.call(
                START
                + """
first, _ = await start("one", "import time; time.sleep(600)")
second, _ = await start("two", "import time; time.sleep(600)")
result["third"] = await refused(client.call("CreateSandbox", C.CreateSandboxRequest(
    project="esc", agent="three", argv=["true"], workdir=WORK)))
result["listed"] = [s.agent for s in (await client.call("ListSandboxes", C.ListSandboxesRequest())).sandboxes]
await remove(first)
third, _ = await start("three", "import time; time.sleep(600)")
result["again"] = third.agent
for one in (second, third):
    await remove(one)
"""
            )
    finally:
        del environment["CLAWKER_CP_FIREWALL__MAX_AGENTS"]
    assert said["third"][:2] == ["RESOURCE_EXHAUSTED", "CAPACITY"] and said["third"][3] == {"limit": "agents"}
    assert sorted(said["listed"]) == ["one", "two"] and said["again"] == "three"
