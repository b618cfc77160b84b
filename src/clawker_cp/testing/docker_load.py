"""
Many containers started and stopped, what the server keeps of them, and how long each was not enrolled.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from clawker_cp.testing.docker_machine import NETWORK, DockerMachine
from clawker_cp.testing.served import Served

AT_ONCE = 4


@dataclass(frozen=True)
class Kept:
    """What the server holds: kernel rows, linked cgroups, threads, descriptors, resident bytes."""

    rows: int
    links: int
    threads: int
    descriptors: int
    resident_bytes: int


class ServerLog:
    """
    The server's log, read as it grows: asking the server instead would be a load of its own.
    """

    def __init__(self, machine: DockerMachine) -> None:
        state = Path(machine.machine.environment["CLAWKER_STATE_DIR"])
        self._path = state / "logs" / "clawker-controlplane.log"
        self._at = 0
        self.seen: dict[tuple[str, str], float] = {}

    def read(self) -> None:
        """Take in what was written since."""
        with self._path.open("rb") as file:
            file.seek(self._at)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            if "id" in entry:
                key = (str(entry["event"]), str(entry["id"]))
                self.seen[key] = datetime.fromisoformat(entry["time"]).timestamp()

    async def wait_for(self, event: str, container: str, limit_s: float = 60) -> None:
        """Wait until an event of a container was logged."""
        async with asyncio.timeout(limit_s):
            while (event, container) not in self.seen:
                self.read()
                await asyncio.sleep(0.02)


async def kept(machine: DockerMachine, served: Served) -> Kept:
    """
    Look at the server from outside.
    """
    process = Path(f"/proc/{served.process.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)
    links = await machine.machine.host.run(["sh", "-c", "ls /sys/fs/bpf/clawker/links | grep -c '^[0-9]' || true"])
    agents = await machine.agents()
    return Kept(
        rows=len(agents),
        links=int(links.out or 0),
        threads=int(status["Threads"]),
        descriptors=len(list((process / "fd").iterdir())),
        resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
    )


async def come_and_go(machine: DockerMachine, count: int) -> list[str]:
    """
    Start containers, wait until each is enrolled, and remove it; a few at the same time. Returns their ids.
    """
    slots = asyncio.Semaphore(AT_ONCE)
    ids: list[str] = []
    log = ServerLog(machine)

    async def one(number: int) -> None:
        async with slots:
            container = await machine.docker.agent(f"a{number}", project="load", network=NETWORK)
            ids.append(container)
            await log.wait_for("enrolled", container)
            await machine.docker.client.remove(container, force=True)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))
    for container in ids:
        await log.wait_for("withdrawn", container)
    return ids


def latencies_s(machine: DockerMachine, ids: list[str], started_ns: dict[str, int]) -> list[float]:
    """
    From the engine's start event to the row in the kernel, by container, as the server's log has it; sorted.
    """
    log = ServerLog(machine)
    log.read()
    wanted = set(ids) & started_ns.keys()
    return sorted(
        log.seen[("enrolled", one)] - started_ns[one] / 1e9 for one in wanted if ("enrolled", one) in log.seen
    )
