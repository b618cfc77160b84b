"""
The lives of containers that somebody else starts and stops, in the order that keeps them closed.

A container is denied as soon as programs judge its cgroup; it is opened as far as its rules say only when its
row is written; its rows go only after its death (I4). The engine is asked for every step: an event says that
something may have changed, never what is true (I9). Engine, policy, kernel and ring are passed in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import structlog

from clawker_cp.agents.directory import Named, full_name
from clawker_cp.agents.quarantines import EXPOSURE, Quarantines
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.errors import ClawkerError, Conflict, NotFound, Unavailable
from clawker_cp.runtime.agent_names import is_name

log = structlog.get_logger()

NO_RULES = "rules: []\n"
DEATH_LIMIT_S = 10.0
AT_ONCE = 16  # containers that a reconcile works on at the same time


class ContainerLike(Named, Protocol):
    """A container as its engine describes it (`engines.base.AgentContainer`)."""

    @property
    def is_agent(self) -> bool: ...
    @property
    def running(self) -> bool: ...
    @property
    def address(self) -> str: ...
    @property
    def cgroup_path(self) -> Path | None: ...
    @property
    def exposures(self) -> Sequence[str]: ...


C = TypeVar("C", bound=ContainerLike)
C_contra = TypeVar("C_contra", bound=ContainerLike, contravariant=True)
C_co = TypeVar("C_co", bound=ContainerLike, covariant=True)


class ContainerEngine(Protocol[C_co]):
    """The engine's record."""

    async def inspect(self, reference: str) -> C_co: ...
    async def living(self) -> Sequence[C_co]: ...


class PolicyControl(Protocol):
    """The reconciler: a known agent has a policy number."""

    async def put_ephemeral(self, key: str, rules: str, *, learn: bool = False) -> int: ...
    def policy_of(self, key: str) -> int: ...
    async def perform(self, act: Callable[[], Awaitable[object]]) -> object: ...
    async def drop_ephemeral(self, key: str) -> None: ...


class ContainerEnforcement(Protocol[C_contra]):
    """Kernel and ring, for one container."""

    async def attach(self, container: C_contra) -> int:
        """Let programs judge the container's cgroup, without a row: denied. Returns the cgroup id."""
        ...

    async def admit(self, agent: EnrolledAgent, container: C_contra) -> None:
        """Write the row; returns when it holds."""
        ...

    async def open(self, container: C_contra) -> None:
        """Let the container's frames pass; from here on it has a network."""
        ...

    async def holds(self, agent: EnrolledAgent, container: C_contra) -> bool:
        """Whether row and programs are there for exactly this cgroup, asked now."""
        ...

    async def isolate(self, agent: EnrolledAgent) -> object:
        """Leave an agent that runs the control plane only, now."""
        ...

    async def wait_dead(self, cgroup_id: int) -> None:
        """Wait until no process can be in the cgroup any more."""
        ...

    async def withdraw(self, agent: EnrolledAgent) -> None:
        """Take back everything of a dead container."""
        ...


async def _nothing_to_settle(_container_id: str) -> None:
    return


class ContainerLives(Generic[C]):
    """
    Follows agents of an engine. Every verb may be repeated, overtaken and late: it brings one container to
    what the engine says of it now. Verbs on one container happen one after the other.

    `up`: whether the firewall is on; while it is off nothing is enrolled. `bypass_until_ns`: the deadline that
    the kernel still has for a cgroup. `quarantine_exposed`: `firewall.on_exposure`. `settle` is awaited
    between a death and the withdrawal, while records still find their agent.
    """

    def __init__(
        self,
        engine: ContainerEngine[C],
        policy: PolicyControl,
        enforcement: ContainerEnforcement[C],
        roster: Roster,
        quarantines: Quarantines,
        *,
        up: Callable[[], bool],
        bypass_until_ns: Callable[[int], int] = lambda _cgroup_id: 0,
        quarantine_exposed: bool = False,
        settle: Callable[[str], Awaitable[None]] = _nothing_to_settle,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._enforcement = enforcement
        self._roster = roster
        self._quarantines = quarantines
        self._up = up
        self._bypass_until_ns = bypass_until_ns
        self._quarantine_exposed = quarantine_exposed
        self._settle = settle
        self._wall = wall
        self._room = asyncio.Semaphore(AT_ONCE)
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._containers: dict[str, C] = {}
        self._failed: dict[str, str] = {}
        self._exposed: dict[str, Sequence[str]] = {}  # as last told
        self._denied: dict[str, C] = {}
        self._half_isolated: set[str] = set()

    def __len__(self) -> int:
        return len(self._containers)

    def living(self) -> list[C]:
        """
        The enrolled containers, as they were last described.
        """
        return list(self._containers.values())

    @property
    def enrols(self) -> bool:
        """Whether agents are enrolled now: the firewall is on."""
        return self._up()

    def failures(self) -> dict[str, str]:
        """
        Running agents that are denied because they could not be enrolled, by id, and why.
        """
        return dict(self._failed)

    def denied(self) -> list[C]:
        """
        Running agents that are denied because they could not be enrolled; `failures` says why.
        """
        return [container for container in self._denied.values() if container.id in self._failed]

    async def refresh(self, container_id: str) -> C | None:
        """
        Bring one container to what the engine says of it; returns it if it runs and is an agent.

        Raises what engine, policy and kernel raise; the container is denied then, and `reconcile` tries again.
        """
        async with self._only(container_id):
            try:
                container = await self._engine.inspect(container_id)
            except NotFound:
                await self._end(container_id)
                return None
            if not (container.is_agent and container.running):
                await self._end(container.id)
                return None
            if self._up():
                self._denied[container.id] = container
                await self._follow(container)
                del self._denied[container.id]
            return container

    async def ensure(self, reference: str) -> C:
        """
        Find a running agent by id, prefix or name and see that it is enrolled.

        Raises `Conflict` (`CONTAINER_GONE`) for what is none or does not run.
        """
        try:
            container = await self._engine.inspect(reference)
        except NotFound as error:
            raise Conflict(f"{error.message}, or it is not running", code="CONTAINER_GONE") from error
        found = await self.refresh(container.id) if container.is_agent else None
        if found is None:
            raise Conflict(f"container {reference!r} is no agent that runs", code="CONTAINER_GONE")
        return found

    async def destroyed(self, container_id: str) -> None:
        """
        Forget what outlives a stop: a container that is gone for good never comes back under its id.
        """
        async with self._only(container_id):
            await self._end(container_id)
            await asyncio.to_thread(self._quarantines.forget, container_id)

    async def reconcile(self) -> None:
        """
        Compare everything with the engine's list, as after a gap in its events.

        One container's failure is logged and does not keep the others; a list that cannot be had is raised.
        """
        listed = {container.id for container in await self._engine.living()}
        async with asyncio.TaskGroup() as group:
            for container_id in listed | set(self._containers):
                group.create_task(self.attempt(container_id), name=f"reconcile-{container_id[:12]}")

    async def retry(self) -> None:
        """
        Try those again that could not be enrolled: a slot or an engine that was missing may be there by now.
        """
        async with asyncio.TaskGroup() as group:
            for container_id in list(self._failed):
                group.create_task(self.attempt(container_id), name=f"retry-{container_id[:12]}")

    async def attempt(self, container_id: str) -> None:
        """
        `refresh`, with failures logged instead of raised.
        """
        try:
            async with self._room:
                await self.refresh(container_id)
        except (ClawkerError, OSError) as error:
            cause = str(error) or type(error).__name__
            if self._failed.get(container_id) != cause:
                log.error("enroll_failed", id=container_id[:12], cause=cause, effect="the agent stays denied")
            self._failed[container_id] = cause

    # -- inner -------------------------------------------------------------------------------

    async def _follow(self, container: C) -> None:
        known = self._roster.by_id(container.id)
        if known is not None and container.cgroup_path is None:
            return  # it is about to end: its death is told next, and withdraws what it has
        cgroup_id = await self._enforcement.attach(container)
        if known is not None and known.cgroup_id != cgroup_id:
            # It was started again: what its former cgroup had goes, the new one has nothing yet.
            await self._withdraw(known)
            known = None
        quarantined = await asyncio.to_thread(self._judge_exposures, container)
        if known is not None and known.address == container.address and await self._enforcement.holds(known, container):
            self._containers[container.id] = container
            self._failed.pop(container.id, None)
            if quarantined:
                await self._policy.perform(partial(self._isolate, container.id))
            return
        self._check(container)
        key = _key(container)
        await self._policy.put_ephemeral(key, NO_RULES)

        async def enrol() -> None:
            # Asked here: an operator may have quarantined it, or released it, since its exposures were judged.
            isolated = await asyncio.to_thread(self._quarantines.get, container.id) is not None
            agent = EnrolledAgent(
                id=container.id,
                project=container.project,
                agent=container.agent,
                address=container.address,
                cgroup_id=cgroup_id,
                policy=self._policy.policy_of(key),
                quarantined=isolated,
                bypass_until_ns=self._bypass_until_ns(cgroup_id),
            )
            await self._enforcement.admit(agent, container)
            self._roster.put(agent)
            self._containers[container.id] = container

        # Among the policy changes, so that none of them passes between the number and the row.
        await self._policy.perform(enrol)
        await self._enforcement.open(container)
        self._failed.pop(container.id, None)
        log.info("enrolled", id=container.id, agent=key, address=container.address)
        if self._roster.by_address(container.address) is None:
            log.warning(
                "agents_share_address",
                id=container.id,
                agent=key,
                address=container.address,
                effect="none of them resolves a name or registers until one is left",
            )

    async def _isolate(self, container_id: str) -> None:
        """What an owner gives away while the agent runs counts as what it had from the start."""
        agent = self._roster.by_id(container_id)
        if agent is None or (agent.quarantined and container_id not in self._half_isolated):
            return
        if await asyncio.to_thread(self._quarantines.get, container_id) is not None:
            self._half_isolated.add(container_id)  # the roster says so first; a ring that failed is tried again
            await self._enforcement.isolate(agent)
            self._half_isolated.discard(container_id)
            log.warning("quarantined", id=container_id[:12], agent=agent.key, cause=EXPOSURE)

    def _check(self, container: C) -> None:
        for label, value, needed in (("agent", container.agent, True), ("project", container.project, False)):
            if (value or needed) and not is_name(value):
                raise Unavailable(
                    f"label dev.clawker.{label} of container {container.id[:12]}: {value[:80]!r} is not a name",
                    hint="make the container again with letters, digits, '_', '.', '-', at most 255",
                )
        if not container.address:
            raise Unavailable(
                f"container {container.id[:12]} has no address on the agents' network",
                code="clawker_net_endpoint_missing",
                hint="connect it to the agents' network",
            )

    def _judge_exposures(self, container: C) -> bool:
        """Tell of ways out the owner gave; returns whether the agent is quarantined, for this or another cause."""
        told = self._exposed.get(container.id, ())
        self._exposed[container.id] = container.exposures
        if container.exposures and not self._quarantines.accepts(container.id, container.exposures):
            shown = ", ".join(container.exposures)
            if tuple(told) != tuple(container.exposures):
                log.warning(
                    "agent_exposed",
                    id=container.id,
                    agent=_key(container),
                    exposures=shown,
                    name=full_name(container.project, container.agent),
                )
            if self._quarantine_exposed and self._quarantines.get(container.id) is None:
                self._quarantines.put(container.id, EXPOSURE, f"exposed: {shown}"[:200], int(self._wall()))
        return self._quarantines.get(container.id) is not None

    async def _end(self, container_id: str) -> None:
        agent = self._roster.by_id(container_id)
        self._failed.pop(container_id, None)
        self._exposed.pop(container_id, None)
        self._denied.pop(container_id, None)
        self._half_isolated.discard(container_id)
        if agent is not None:
            await self._settle(container_id)
            await self._withdraw(agent)
        self._containers.pop(container_id, None)

    async def _withdraw(self, agent: EnrolledAgent) -> None:
        try:
            async with asyncio.timeout(DEATH_LIMIT_S):
                await self._enforcement.wait_dead(agent.cgroup_id)
        except TimeoutError as error:
            # Something of it still lives: row and rules stay, and a later look tries again (I4).
            raise Unavailable(f"processes of container {agent.id[:12]} are still there after its end") from error
        self._roster.remove(agent.id)
        await self._enforcement.withdraw(agent)
        if not self._roster.with_key(agent.key):
            await self._policy.drop_ephemeral(agent.key)
        log.info("withdrawn", id=agent.id, agent=agent.key)

    @asynccontextmanager
    async def _only(self, container_id: str) -> AsyncIterator[None]:
        """One verb at a time for one container, in order of arrival; locks go with their last holder."""
        lock, holders = self._locks.get(container_id, (asyncio.Lock(), 0))
        self._locks[container_id] = (lock, holders + 1)
        try:
            async with lock:
                yield
        finally:
            lock, holders = self._locks[container_id]
            if holders == 1:
                del self._locks[container_id]
            else:
                self._locks[container_id] = (lock, holders - 1)


def _key(container: ContainerLike) -> str:
    return f"agent:{container.project}/{container.agent}"
