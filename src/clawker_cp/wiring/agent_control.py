"""
What an operator does to one running agent: enable, bypass, quarantine, release.

Every verb is one item of the reconciler's queue, so it has its place among policy changes. A bypass is
a deadline in the kernel (I3): nothing here has to happen for it to end; `run` only cuts what is left
over. A quarantine is on disk before the kernel has it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

import structlog

from clawker_cp.agents.quarantines import OPERATOR, Quarantines
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.errors import Conflict, InvalidInput, NotFound
from clawker_cp.wiring.enforcement import Living

log = structlog.get_logger()

NANOSECONDS = 1_000_000_000


class InOrder(Protocol):
    """The reconciler's queue."""

    async def perform(self, act: Callable[[], Awaitable[Any]]) -> Any: ...


class AgentKernel(Protocol):
    """`Enforcement`, as far as one agent is concerned."""

    async def enroll(self, agent: EnrolledAgent, living: Living) -> None: ...
    def enrolled(self, agent: EnrolledAgent) -> bool: ...
    async def open_until(self, agent: EnrolledAgent, until_ns: int, seconds: float) -> None: ...
    async def end_bypass(self, agent: EnrolledAgent) -> int: ...
    async def cut_unruled(self, agent: EnrolledAgent) -> int: ...
    async def isolate(self, agent: EnrolledAgent) -> int: ...
    async def restore(self, agent: EnrolledAgent) -> None: ...


class AgentControl:
    """
    Verbs on running agents. `find` asks the engine for the running agent that a reference means,
    `exposures` gives the ways out it was given: a release accepts those (R16).
    """

    def __init__(
        self,
        order: InOrder,
        kernel: AgentKernel,
        roster: Roster,
        quarantines: Quarantines,
        find: Callable[[str], Awaitable[Living]],
        *,
        bypass_default_s: int = 30,
        bypass_max_s: int = 3600,
        acknowledge_disable: bool = False,
        exposures: Callable[[str], Sequence[str]] = lambda _agent_id: (),
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._order = order
        self._kernel = kernel
        self._roster = roster
        self._quarantines = quarantines
        self._find = find
        self._bypass_default_s = bypass_default_s
        self._bypass_max_s = bypass_max_s
        self._acknowledge_disable = acknowledge_disable
        self._exposures = exposures
        self._clock_ns = clock_ns
        self._wall = wall
        self._bypassed: dict[str, int] = {}
        self._changed = asyncio.Event()

    # -- AdminService ------------------------------------------------------------------------

    async def enable(self, container_id: str) -> None:
        """
        Make sure an agent is enrolled and not bypassed; a quarantine stays. Returns when the kernel has it.

        Raises `Conflict` (`CONTAINER_GONE`) if nothing like that runs.
        """
        living = await self._running(container_id)
        await self._order.perform(partial(self._enable, living))

    async def disable(self, container_id: str) -> None:
        """
        Refuse to open a running agent; fine for one that is not there (contract 6.2).
        """
        if not container_id:
            raise InvalidInput("container_id: is empty")
        try:
            living = await self._running(container_id)
        except Conflict:
            return
        if self._acknowledge_disable:
            log.info("firewall_disable_ignored", id=living.id[:12])
            return
        log.info("firewall_disable_refused", id=living.id[:12])
        raise Conflict(
            'firewall stays on while the container runs; for a limited time use "firewall bypass"',
            code="AGENT_RUNNING",
        )

    async def bypass(self, container_id: str, seconds: int) -> None:
        """
        Let an agent pass for a time (0 = the default); a later call replaces an earlier one.
        """
        if seconds > self._bypass_max_s:
            raise InvalidInput(
                f"timeout_seconds: {seconds} is more than {self._bypass_max_s}", hint="write a rule, or grant one"
            )
        living = await self._running(container_id)
        await self._order.perform(partial(self._bypass, living, seconds or self._bypass_default_s))

    # -- ControlService ----------------------------------------------------------------------

    async def quarantine(self, agent: EnrolledAgent, reason: str) -> int:
        """
        Leave an agent the control plane only, until released; returns how many connections were cut.
        """
        count: int = await self._order.perform(partial(self._quarantine, agent.id, reason))
        return count

    async def release(self, agent: EnrolledAgent) -> None:
        """
        End a quarantine of any cause; fine if there is none.
        """
        await self._order.perform(partial(self._release, agent.id))

    async def registered(self, agent_id: str) -> None:
        """
        An agent attested who it is: that ends a quarantine for lack of trust, and no other.
        """
        await self._order.perform(partial(self._trust, agent_id))

    def quarantine_reason(self, agent_id: str) -> str:
        """
        Why an agent is quarantined, "" if it is not. Reads the database: call it in a thread.
        """
        row = self._quarantines.get(agent_id)
        return (row.reason or row.cause) if row is not None else ""

    # -- time --------------------------------------------------------------------------------

    def follow_bypass(self, agent: EnrolledAgent) -> None:
        """
        Take over an agent whose bypass an earlier control plane began.
        """
        if agent.bypassed:
            self._bypassed[agent.id] = agent.bypass_until_ns
            self._changed.set()

    async def run(self) -> None:
        """
        Cut what a bypass leaves behind at its end, until cancelled.
        """
        while True:
            self._changed.clear()
            now = self._clock_ns()
            for agent_id in [one for one, until in self._bypassed.items() if until <= now]:
                del self._bypassed[agent_id]
                agent = self._roster.by_id(agent_id)
                if agent is not None and not agent.bypassed:
                    cut = await self._kernel.cut_unruled(agent)
                    log.info("bypass_ended", id=agent_id[:12], agent=agent.key, connections_cut=cut)
            following = min(self._bypassed.values(), default=None)
            wait_s = None if following is None else max((following - self._clock_ns()) / NANOSECONDS, 0.0)
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    # -- inner -------------------------------------------------------------------------------

    async def _running(self, container_id: str) -> Living:
        if not container_id:
            raise InvalidInput("container_id: is empty")
        try:
            return await self._find(container_id)
        except NotFound as error:
            raise Conflict(f"{error.message}, or it is not running", code="CONTAINER_GONE") from error

    async def _enable(self, living: Living) -> None:
        agent = await self._enrolled(living)
        if agent.bypassed:
            cut = await self._kernel.end_bypass(agent)
            self._bypassed.pop(agent.id, None)
            log.info("bypass_ended", id=agent.id[:12], agent=agent.key, connections_cut=cut)

    async def _enrolled(self, living: Living) -> EnrolledAgent:
        agent = self._known(living.id)
        if not self._kernel.enrolled(agent):
            await self._kernel.enroll(agent, living)
            log.info("enrolled", id=agent.id[:12], agent=agent.key)
        return agent

    async def _bypass(self, living: Living, seconds: int) -> None:
        agent = await self._enrolled(living)
        if agent.quarantined:
            raise Conflict(
                f"agent {agent.key.removeprefix('agent:')} is quarantined; release it first", code="AGENT_QUARANTINED"
            )
        until = self._clock_ns() + seconds * NANOSECONDS
        await self._kernel.open_until(agent, until, seconds)
        self._bypassed[agent.id] = until
        self._changed.set()
        log.warning("bypass_started", id=agent.id[:12], agent=agent.key, seconds=seconds)

    async def _quarantine(self, agent_id: str, reason: str) -> int:
        agent = self._known(agent_id)
        await asyncio.to_thread(self._quarantines.put, agent.id, OPERATOR, reason, int(self._wall()))
        self._bypassed.pop(agent.id, None)
        count = await self._kernel.isolate(agent)
        log.warning("quarantined", id=agent.id[:12], agent=agent.key, cause=OPERATOR, connections_cut=count)
        return count

    async def _release(self, agent_id: str) -> None:
        agent = self._known(agent_id)
        was = await asyncio.to_thread(self._quarantines.release, agent.id, self._exposures(agent.id))
        if agent.quarantined or was:
            await self._kernel.restore(agent)
            log.warning("released", id=agent.id[:12], agent=agent.key)

    async def _trust(self, agent_id: str) -> None:
        if await asyncio.to_thread(self._quarantines.registered, agent_id):
            agent = self._known(agent_id)
            await self._kernel.restore(agent)
            log.warning("released", id=agent.id[:12], agent=agent.key, cause="registered")

    def _known(self, agent_id: str) -> EnrolledAgent:
        agent = self._roster.by_id(agent_id)
        if agent is None:
            raise Conflict(f"container {agent_id[:12]} is not running any more", code="CONTAINER_GONE")
        return agent
