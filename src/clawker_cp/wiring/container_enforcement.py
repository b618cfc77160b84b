"""
Kernel and ring of one container, in the order that keeps it closed: programs, row, frames.

Fulfils `agents.container_lives.ContainerEnforcement` with the manager, `wiring.enforcement` and the ring around
the containers' bridge. Other containers of that bridge, which are no agents, get their frames passed here too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from clawker_cp.agents.roster import EnrolledAgent
from clawker_cp.engines.base import AgentContainer
from clawker_cp.errors import ClawkerError, Conflict, Unavailable
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.wiring.enforcement import Living

log = structlog.get_logger()

DEATH_POLL_S = 0.02


class Programs(Protocol):
    """`ebpf.Manager`, as far as cgroups of containers are concerned."""

    def attach(self, cgroup: Path) -> int: ...
    def detach(self, cgroup_id: int) -> None: ...
    def attached(self) -> set[int]: ...


class Rows(Protocol):
    """`wiring.enforcement`, as far as containers are concerned."""

    async def enroll(self, agent: EnrolledAgent, living: Living) -> None: ...
    def enrolled(self, agent: EnrolledAgent) -> bool: ...
    async def isolate(self, agent: EnrolledAgent) -> int: ...
    async def cut_strangers(self, agent: EnrolledAgent) -> int: ...
    async def readmit(self, address: str) -> None: ...
    async def withdraw(self, agent: EnrolledAgent) -> None: ...


class Port(Protocol):
    """The host's side of a container's veth, and the MAC of the other side."""

    @property
    def interface(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def mac(self) -> str: ...


class Pins(Protocol):
    """The ring, as far as ports of the bridge are concerned."""

    async def pin(self, interface: str, address: str, *, mac: str, infrastructure: bool = False) -> None: ...
    async def unpin(self, interface: str, address: str) -> None: ...


@dataclass(frozen=True, slots=True)
class _Pinned:
    """A container's first process, its port, its address, and whether the ring takes it for an agent."""

    pid: int
    port: Port
    address: str
    is_agent: bool


class ContainerEnforcement:
    """
    Programs, rows and frames of containers. `ring` None: there is none. `find_port` finds the port of a
    container by its first process.
    """

    def __init__(
        self,
        programs: Programs,
        enforcement: Rows,
        ring: Pins | None,
        find_port: Callable[[int], Awaitable[Port]],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._programs = programs
        self._enforcement = enforcement
        self._ring = ring
        self._find_port = find_port
        self._clock = clock
        self._paths: dict[int, Path] = {}
        self._pinned: dict[str, _Pinned] = {}  # by container; those that share a network namespace share a port
        self._doubted: set[str] = set()

    def doubt(self, container_id: str) -> None:
        """
        Look a container's port up again before the next time it is said to hold: it may be another one by now.
        """
        self._doubted.add(container_id)

    def owner(self, index: int) -> str:
        """
        The container that an interface of the host leads to, "" for none.
        """
        return next((one for one, pinned in self._pinned.items() if pinned.port.index == index), "")

    async def took_over(self, containers: Sequence[AgentContainer]) -> list[tuple[AgentContainer, Port]]:
        """
        Remember those whose frames an earlier server's ring lets pass already; returns each with its port.
        """
        found = []
        for container in containers:
            try:
                port = await self._find_port(container.pid)
            except ClawkerError as error:
                log.info("container_port_missing", id=container.id[:12], cause=error.message)
                continue
            self._pinned[container.id] = _Pinned(container.pid, port, container.address, container.is_agent)
            found.append((container, port))
        return found

    async def attach(self, container: AgentContainer) -> int:
        """
        Let programs judge the container's cgroup; without a row everything is denied.
        """
        if container.cgroup_path is None:
            raise Unavailable(
                f"the cgroup of container {container.id[:12]} is not to be found",
                hint="is cgroup2 mounted, and the engine's cgroup driver one of cgroupfs and systemd?",
            )
        cgroup_id = await asyncio.to_thread(self._programs.attach, container.cgroup_path)
        self._paths[cgroup_id] = container.cgroup_path
        return cgroup_id

    async def admit(self, agent: EnrolledAgent, container: AgentContainer) -> None:
        """
        Write the row, and what the ring admits of its policy.
        """
        await self._enforcement.enroll(agent, container)

    async def open(self, container: AgentContainer) -> None:
        """
        Let the container's frames pass, as far as its policy goes.
        """
        await self._pin(container)
        await self._enforcement.readmit(container.address)

    async def admit_neighbour(self, container: AgentContainer) -> None:
        """
        Let frames of a container pass that is no agent: monitoring, or somebody's own on the same bridge.
        """
        if container.address:
            await self._pin(container, infrastructure=True)

    async def forget_neighbour(self, container_id: str) -> None:
        """
        Take a port back from a container that is gone; fine for one that had none.
        """
        await self._unpin(container_id)

    async def holds(self, agent: EnrolledAgent, container: AgentContainer) -> bool:
        """
        Whether the row is there and the frames of exactly this port pass.
        """
        known = self._pinned.get(container.id)
        pinned = known is not None and (known.pid, known.address) == (container.pid, container.address)
        pinned = pinned and container.id not in self._doubted
        return (pinned or self._ring is None) and self._enforcement.enrolled(agent)

    async def isolate(self, agent: EnrolledAgent) -> None:
        """
        See `Enforcement.isolate`.
        """
        await self._enforcement.isolate(agent)

    async def wait_dead(self, cgroup_id: int) -> None:
        """
        Wait until no process is in the cgroup any more. One that we never attached is not waited for.
        """
        path = self._paths.get(cgroup_id)
        while path is not None and _populated(path, cgroup_id):
            await self._clock.sleep(DEATH_POLL_S)

    async def cut_strangers(self, agent: EnrolledAgent) -> None:
        """
        See `Enforcement.cut_strangers`.
        """
        await self._enforcement.cut_strangers(agent)

    async def withdraw(self, agent: EnrolledAgent) -> None:
        """
        Take back everything of a dead container: frames first, then the row, then the programs.
        """
        await self._unpin(agent.id)
        await self._enforcement.withdraw(agent)
        self._paths.pop(agent.cgroup_id, None)

    async def sweep(self, living: set[int]) -> None:
        """
        Let go of cgroups that were attached early and whose container never became an agent's.
        """
        for cgroup_id in self._programs.attached() - living:
            path = self._paths.get(cgroup_id)
            if path is None or not _populated(path, cgroup_id):
                try:
                    await asyncio.to_thread(self._programs.detach, cgroup_id)
                except Conflict as error:
                    log.info("programs_kept", cgroup_id=cgroup_id, cause=error.message)
                else:
                    self._paths.pop(cgroup_id, None)

    # -- inner -------------------------------------------------------------------------------

    async def _pin(self, container: AgentContainer, *, infrastructure: bool = False) -> None:
        if self._ring is None:
            return
        port = await self._find_port(container.pid)
        before = self._pinned.get(container.id)
        if before is not None and (before.port.interface, before.address) != (port.interface, container.address):
            await self._unpin(container.id)
        sharing = self._sharing(container.id, port)
        # Behind one port every process makes the same frames: with an agent behind it, it is the agent's.
        if not infrastructure or not any(one.is_agent for one in sharing):
            await self._ring.pin(port.interface, container.address, mac=port.mac, infrastructure=infrastructure)
        self._pinned[container.id] = _Pinned(container.pid, port, container.address, not infrastructure)
        self._doubted.discard(container.id)

    async def _unpin(self, container_id: str) -> None:
        self._doubted.discard(container_id)
        pinned = self._pinned.pop(container_id, None)
        if pinned is None or self._ring is None:
            return
        port, sharing = pinned.port, self._sharing(container_id, pinned.port)
        try:
            if not sharing:
                await self._ring.unpin(port.interface, pinned.address)
            elif pinned.is_agent and not any(one.is_agent for one in sharing):
                await self._ring.pin(port.interface, sharing[0].address, mac=port.mac, infrastructure=True)
        except ClawkerError as error:
            # Its veth is gone with it; the pin names an interface that nobody has.
            log.warning("ring_pin_kept", interface=port.interface, cause=error.message)

    def _sharing(self, container_id: str, port: Port) -> list[_Pinned]:
        """The other containers behind a port."""
        return [
            one for other, one in self._pinned.items() if other != container_id and one.port.interface == port.interface
        ]


def _populated(path: Path, cgroup_id: int) -> bool:
    """Whether processes are in a cgroup, or below it; another cgroup of the same path is not the same."""
    try:
        return path.stat().st_ino == cgroup_id and "populated 1" in (path / "cgroup.events").read_text()
    except OSError:
        return False
