"""
A machine with a real Docker daemon, an outside world and a control plane that serves its containers.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from clawker_cp.testing.docker_world import DockerWorld
from clawker_cp.testing.machine import Machine
from clawker_cp.testing.world import Finished, HostNamespace, World

NETWORK = "clawker-net"


class DockerMachine:
    """
    `machine` runs the server, `docker` its containers; `inside` runs a program in one as a user would.
    """

    def __init__(self, machine: Machine, docker: DockerWorld) -> None:
        self.machine = machine
        self.docker = docker

    async def ctl(self, *words: str, timeout_s: float = 30) -> Finished:
        """Run `clawkerctl` on the machine."""
        argv = [sys.executable, "-m", "clawker_cp.cli.ctl.main", *words]
        return await self.machine.host.run(argv, env=self.machine.environment, timeout_s=timeout_s)

    async def told(self, *words: str) -> Any:
        """What `clawkerctl --json ...` says, a document; raises AssertionError when it fails."""
        done = await self.ctl("--json", *words)
        assert done.code == 0, done.err
        return json.loads(done.out or "{}")

    async def agents(self) -> list[dict[str, Any]]:
        """The running agents, as `clawkerctl agents` lists them."""
        listed: list[dict[str, Any]] = (await self.told("agents")).get("sessions", [])
        return listed

    async def flows(self, *words: str) -> list[dict[str, Any]]:
        """Records of decisions, as `clawkerctl flows` lists them."""
        done = await self.ctl("--json", "flows", *words)
        assert done.code == 0, done.err
        return [json.loads(line) for line in done.out.splitlines() if line.strip()]

    async def wait_enrolled(self, container: str, limit_s: float = 20) -> None:
        """Wait until a container is listed as enrolled."""
        async with asyncio.timeout(limit_s):
            while not any(one["container_id"] == container and one.get("enrolled") for one in await self.agents()):
                await asyncio.sleep(0.05)

    async def inside(self, container: str, *argv: str, timeout_s: float = 60) -> Finished:
        """Run a program in a container, as `docker exec` does."""
        command = ["docker", "exec", container, *argv]
        return await self.machine.host.run(command, env=self.machine.environment, timeout_s=timeout_s)

    async def python(self, container: str, code: str, timeout_s: float = 60) -> Finished:
        """Run a piece of Python in a container that has the machine's programs."""
        return await self.inside(container, "/usr/bin/python3", "-c", code, timeout_s=timeout_s)


@asynccontextmanager
async def docker_machine(*, own_pids: bool = False, **options: Any) -> AsyncIterator[DockerMachine]:
    """
    A fresh machine, world and daemon; all are gone afterwards. `options` are `DockerWorld`'s, `own_pids` is
    `HostNamespace`'s: a control plane that is a container needs a machine with processes of its own.
    """
    async with HostNamespace(own_pids=own_pids) as host, World(host) as world, DockerWorld(host, **options) as docker:
        machine = Machine(host, world)
        machine.environment |= docker.environment()
        machine.environment["CLAWKER_CP_ENGINE"] = "docker"
        yield DockerMachine(machine, docker)
