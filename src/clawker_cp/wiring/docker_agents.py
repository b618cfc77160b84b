"""
Agents of the Docker engine as the server has them: found, enrolled and let go as the engine tells of them.

Events only say that something may have changed (`agents.container_lives` asks the engine); a missed one costs
time, never enforcement. Before any event a container of the agents' network has no port of its own in the ring,
and its cgroup is linked as soon as the kernel makes it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from clawker_cp.agents.container_lives import ContainerLives
from clawker_cp.agents.registry import Registry
from clawker_cp.agents.roster import Roster
from clawker_cp.ebpf import Manager
from clawker_cp.ebpf.pins import Pins
from clawker_cp.engines.base import AgentContainer, AgentNetwork
from clawker_cp.engines.docker.cgroup_watch import CgroupWatch, Missed
from clawker_cp.engines.docker.ports import PortWatch
from clawker_cp.engines.docker.ring_rules import Pin
from clawker_cp.engines.dockerevents import DockerEvent, DockerEventFeeder
from clawker_cp.engines.host.commands import host_netns
from clawker_cp.engines.host.nflog import RingLog
from clawker_cp.errors import ClawkerError, NotFound, Unavailable
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.subscriptions import Overflow
from clawker_cp.wiring.agent_control import AgentControl
from clawker_cp.wiring.agent_side import Part
from clawker_cp.wiring.container_enforcement import ContainerEnforcement, Port
from clawker_cp.wiring.docker_host import DockerHost
from clawker_cp.wiring.world_feed import WorldFeed

log = structlog.get_logger()

SWEEP_S = 30.0
RETRY_S = 3.0
LIST_TRIES, LIST_PAUSE_S = 3, 0.1
_CONTAINER_ID = re.compile(r"(?:docker-)?([0-9a-f]{64})(?:\.scope)?")
# A network event of these is one of a container: of the agents' network, or a way out by another.
_OF_NETWORK = frozenset(("connect", "disconnect"))


class DockerAgents:
    """
    Fulfils `agent_side.AgentSide` with containers. The engine's events come over the bus from `feeder`.
    """

    name = "docker"
    sandboxes = None

    def __init__(
        self,
        host: DockerHost,
        feeder: DockerEventFeeder,
        overseer: Overseer,
        lives: ContainerLives[AgentContainer],
        enforcement: ContainerEnforcement,
        manager: Manager,
        roster: Roster,
        registry: Registry,
        *,
        pin_dir: Path,
    ) -> None:
        self._host = host
        self._engine = host.engine
        self._ring = host.ring
        self._feeder = feeder
        self._overseer = overseer
        self._lives = lives
        self._enforcement = enforcement
        self._manager = manager
        self._roster = roster
        self._registry = registry
        self._pin_dir = pin_dir
        self._feed = WorldFeed(overseer, host.engine.inspect, host.existing, host.network.id)
        self._ring_logs: list[RingLog] = []
        self.resolver = host.engine

    @property
    def network(self) -> AgentNetwork:
        return self._engine.network

    def living(self) -> Sequence[AgentContainer]:
        return self._lives.living()

    async def running(self) -> Sequence[AgentContainer]:
        return await self._engine.living()

    async def find(self, reference: str) -> AgentContainer:
        return await self._lives.ensure(reference)

    def exposures(self, agent_id: str) -> Sequence[str]:
        return next((one.exposures for one in (*self.living(), *self.denied()) if one.id == agent_id), ())

    def denied(self) -> Sequence[AgentContainer]:
        return self._lives.denied()

    def failures(self) -> Mapping[str, str]:
        return self._lives.failures()

    async def prepare(self) -> None:
        """
        Put the ring around the bridge before anything else: what an earlier server enrolled keeps its port.
        """
        await self._limit_shares()
        containers = await self._on_network()
        kept = self._enrolled_before()
        agents = [one for one in containers if one.is_agent and one.cgroup_id in kept]
        others = [one for one in containers if not one.is_agent]
        if self._ring is None:
            return
        await self._ring.install(
            [_pin(*found) for found in await self._enforcement.took_over(agents)],
            [_pin(*found) for found in await self._enforcement.took_over(others)],
        )
        self._watch_drops()

    async def cgroups(self) -> set[int]:
        return {container.cgroup_id for container in await self._engine.living()}

    async def enrol_all(self) -> None:
        await self._lives.reconcile()

    def parts(self) -> list[Part]:
        late = "agents are enrolled late; until then they are denied"
        return [
            ("docker_events", self._feeder.run, late),
            ("enrolment", self._follow_events, late),
            ("worldview", self._feed.run, "what is shown of containers is late"),
            ("cgroup_watch", self._watch_cgroups, "containers are linked when their start is told, not before"),
            ("bridge_ports", self._watch_ports, "ports without an agent may reach each other"),
            ("programs_swept", self._sweep, "links of dead cgroups stay"),
            ("enrolment_retried", self._retry, "an agent that could not be enrolled stays denied"),
        ]

    async def take_over(self, group: asyncio.TaskGroup, agents: AgentControl) -> list[asyncio.Task[None]]:
        await self._reap()
        await self._lives.reconcile()
        for agent in self._roster:
            agents.follow_bypass(agent)
            await self._enforcement.cut_strangers(agent)
        return []

    def close(self) -> None:
        """Nothing: who starts containers is the engine, and what it starts now is denied by the ring."""

    def stages(self, *, empty: bool) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        return [("ring", partial(self._leave, empty=empty))]

    # -- what the engine tells ----------------------------------------------------------------

    async def _follow_events(self) -> None:
        async with (
            self._overseer.subscription(DockerEvent, name="enrolment", stuck_after_s=None) as events,
            asyncio.TaskGroup() as group,
        ):
            async for event in events:
                if isinstance(event, Overflow):
                    log.warning("docker_events_lost", count=event.count)
                    self._engine.forget()
                    group.create_task(self._reconcile(), name="reconcile")
                    continue
                self._engine.take_event(event)
                if event.container_id:
                    group.create_task(self._handle(event), name=f"docker-{event.action}")

    async def _handle(self, event: DockerEvent) -> None:
        container_id, action = event.container_id, event.action
        if event.kind == "network":
            if action not in _OF_NETWORK:
                return
            if event.id == self.network.id:
                self._enforcement.doubt(container_id)
        if event.kind == "container" and action == "destroy":
            await self._gone(container_id)
            return
        await self._lives.attempt(container_id)
        if self._roster.by_id(container_id) is None:
            await self.see_neighbour(container_id)

    async def _gone(self, container_id: str) -> None:
        try:
            await self._lives.destroyed(container_id)
            await self._enforcement.forget_neighbour(container_id)
            await asyncio.to_thread(self._registry.evict, container_id)
        except (ClawkerError, OSError) as error:
            log.warning("container_remains", id=container_id[:12], cause=str(error))

    async def see_neighbour(self, container_id: str) -> None:
        """A container that is no agent: its frames pass while it runs and is on our network."""
        try:
            container = await self._engine.inspect(container_id)
        except NotFound:
            await self._enforcement.forget_neighbour(container_id)
            return
        except ClawkerError as error:
            log.warning("neighbour_unknown", id=container_id[:12], cause=error.message)
            return
        if container.is_agent:
            return
        if container.shares:
            # It is behind another's port, and what that one is exposed to has changed.
            try:
                shared = await self._engine.inspect(container.shares)
            except ClawkerError as error:
                log.info("shared_network_unknown", id=container_id[:12], cause=error.message)
            else:
                await self._lives.attempt(shared.id)
            return
        try:
            if container.running and container.address:
                await self._enforcement.admit_neighbour(container)
            else:
                await self._enforcement.forget_neighbour(container_id)
        except ClawkerError as error:
            log.info("neighbour_closed", id=container_id[:12], cause=error.message)

    async def _reconcile(self) -> None:
        try:
            for container in self.living():
                self._enforcement.doubt(container.id)
            await self._lives.reconcile()
            for container_id in await self._host.on_network():
                if self._roster.by_id(container_id) is None:
                    await self.see_neighbour(container_id)
        except ClawkerError as error:
            log.warning("reconcile_failed", cause=error.message)

    # -- before the engine tells --------------------------------------------------------------

    async def _watch_cgroups(self) -> None:
        """Link programs to an agent's cgroup when the kernel makes it, which is before its first process."""
        async with CgroupWatch(self._host.cgroup_parents()) as watch, asyncio.TaskGroup() as group:
            async for made in watch:
                if isinstance(made, Missed):
                    group.create_task(self._reconcile(), name="reconcile")
                elif match := _CONTAINER_ID.fullmatch(made.name):
                    group.create_task(self._link_early(match[1], made), name="cgroup-made")

    async def _link_early(self, container_id: str, cgroup: Path) -> None:
        try:
            container = await self._engine.inspect(container_id)
            if container.is_agent and self._lives.enrols:
                await asyncio.to_thread(self._manager.attach, cgroup)
        except (ClawkerError, OSError) as error:
            log.info("cgroup_not_linked_early", id=container_id[:12], cause=str(error))

    async def _watch_ports(self) -> None:
        if self._ring is None:
            return
        watch = PortWatch(self.network.bridge, host_pid=self._host.host_pid)
        await watch.open()
        try:
            while True:
                await watch.wait_changed()
                await self._ring.close_unpinned()
        finally:
            watch.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            if self._lives.enrols:
                await self._enforcement.sweep({agent.cgroup_id for agent in self._roster})

    async def _retry(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            if self._lives.enrols:
                await self._lives.retry()

    # -- start and end ------------------------------------------------------------------------

    async def _on_network(self) -> list[AgentContainer]:
        found = []
        for container_id in await self._host.on_network():
            with suppress(NotFound):
                found.append(await self._engine.inspect(container_id))
        return [one for one in found if one.running and one.address]

    def _enrolled_before(self) -> set[int]:
        try:
            return {int(row["cgroup_id"]) for row in Pins(self._pin_dir).containers()}
        except (NotFound, Unavailable):
            return set()

    async def _reap(self) -> None:
        """Rows of containers that no longer exist go; if the engine cannot say, none does (contract 9.8)."""
        for attempt in range(LIST_TRIES):
            try:
                existing = await self._host.existing()
                break
            except ClawkerError as error:
                if attempt == LIST_TRIES - 1:
                    log.warning("reap_degraded", cause=error.message, tries=LIST_TRIES)
                    return
                await asyncio.sleep(LIST_PAUSE_S * 2**attempt)
        gone = await asyncio.to_thread(self._registry.keep_only, existing)
        if gone:
            log.info("registry_reaped", count=len(gone))

    async def _limit_shares(self) -> None:
        if self._host.share is None:
            return
        try:
            await self._host.share.install()
        except ClawkerError as error:
            effect = "one agent may take every connection that the control plane accepts"
            log.warning("agents_share_unlimited", cause=error.message, effect=effect)
            return
        self._watch(self._host.share.group, lambda _interface: "", None)

    def _watch_drops(self) -> None:
        if self._ring is not None:
            self._watch(self._ring.group, self._enforcement.owner, host_netns(self._host.host_pid))

    def _watch(self, group: int, owner: Callable[[int], str], namespace: Path | None) -> None:
        """Report what is dropped in a network namespace, None: in our own."""
        if self._host.on_drop is None:
            return
        ring_log = RingLog(group, owner, self._host.on_drop, by_source=self._at, namespace=namespace)
        try:
            ring_log.open()
        except Unavailable as error:
            log.warning("host_ring_log_unavailable", cause=str(error))
            return
        self._ring_logs.append(ring_log)

    def _at(self, address: str) -> str:
        agent = self._roster.by_address(address)
        return agent.id if agent is not None else ""

    async def _leave(self, *, empty: bool) -> None:
        while self._ring_logs:
            self._ring_logs.pop().close()
        if self._host.share is not None:
            await self._host.share.remove()
        if not empty:
            return
        if self._ring is not None:
            await self._ring.remove()
        self._host.remove_parent()


def _pin(container: AgentContainer, port: Port) -> Pin:
    return Pin(port.interface, container.address, port.mac)
