"""
The life of one sandbox, in the order that keeps it closed: address, policy, kernel row, process.

An agent's first process starts only after its cgroup is enrolled, and its kernel row goes only
after its death (I4). Engine, policy, kernel and roster are passed in by the application; this
module owns the order and undoing half a start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import structlog

from clawker_cp.agents.directory import Named
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.errors import ClawkerError, NotFound

log = structlog.get_logger()

END_LIMIT_S = 15.0


class SandboxLike(Named, Protocol):
    """What the engine tells of a sandbox it made."""

    @property
    def address(self) -> str: ...
    @property
    def cgroup_id(self) -> int: ...


class SandboxEngine(Protocol):
    """The part of the host engine that a life needs."""

    async def create(self, spec: Any) -> Any: ...
    async def run(self, sandbox_id: str, streams: tuple[int, int, int]) -> None: ...
    async def wait(self, sandbox_id: str) -> int: ...
    async def signal(self, sandbox_id: str, signo: int) -> None: ...
    async def stop(self, sandbox_id: str, *, grace_s: float) -> None: ...
    async def remove(self, sandbox_id: str, *, force: bool, grace_s: float) -> None: ...


class PolicyControl(Protocol):
    """Where rules that live as long as a sandbox are put; returns when they are enforced."""

    async def put_ephemeral(self, key: str, rules: str, *, learn: bool) -> int: ...
    def policy_of(self, key: str) -> int: ...
    async def drop_ephemeral(self, key: str) -> None: ...


class Enforcement(Protocol):
    """The kernel side of one agent: row, published ports, direct paths."""

    async def enroll(self, agent: EnrolledAgent, sandbox: Any) -> None: ...
    async def withdraw(self, agent: EnrolledAgent) -> None: ...


@dataclass(frozen=True, slots=True)
class LifeRequest:
    """
    What a client asks for: the engine's spec, and a rules document that lives as long as the sandbox.
    """

    spec: Any
    rules: str
    learn: bool = False


async def _nothing_to_settle(_sandbox_id: str) -> None:
    return


class SandboxLives:
    """
    Starts, follows and ends sandboxes.

    `prepared` leaves either a whole, enrolled sandbox or nothing, also when cancelled. `settle` is awaited between a
    sandbox's death and its withdrawal, while its records still find it and it is taken apart. What cannot be taken
    away stays a life, with its row and its rules, until `retry` or whoever else ends it succeeds.
    """

    def __init__(
        self,
        engine: SandboxEngine,
        policy: PolicyControl,
        enforcement: Enforcement,
        roster: Roster,
        settle: Callable[[str], Awaitable[None]] = _nothing_to_settle,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._enforcement = enforcement
        self._roster = roster
        self._settle = settle
        self._require: Callable[[], None] = lambda: None
        self._lives: dict[str, EnrolledAgent] = {}
        self._ending: dict[str, asyncio.Event] = {}
        self._left: set[str] = set()  # lives whose end was begun and did not succeed

    def __len__(self) -> int:
        return len(self._lives)

    def require(self, check: Callable[[], None]) -> None:
        """
        Call `check` before anything is made for a sandbox; what it raises refuses it.
        """
        self._require = check

    @asynccontextmanager
    async def prepared(self, request: LifeRequest) -> AsyncIterator[SandboxLike]:
        """
        Create and enrol a sandbox in which nothing runs yet; it is undone if the body fails.
        """
        self._require()
        sandbox = await self._engine.create(request.spec)
        agent = _agent_of(sandbox, request)
        self._lives[agent.id] = agent
        try:
            policy = await self._policy.put_ephemeral(agent.key, request.rules, learn=request.learn)
            agent = replace(agent, policy=policy)
            await self._enforcement.enroll(agent, sandbox)
            self._roster.put(agent)
            self._lives[agent.id] = agent
            log.info("enrolled", id=agent.id, agent=agent.key, policy=policy, address=agent.address)
            yield sandbox
        except BaseException:
            await asyncio.shield(self._end(agent))
            raise

    async def launch(self, sandbox_id: str, streams: tuple[int, int, int]) -> None:
        """
        Run the command of a prepared sandbox on the given streams.
        """
        await self._engine.run(sandbox_id, streams)

    def adoptee(
        self, sandbox: SandboxLike, request: LifeRequest, *, bypass_until_ns: int = 0, quarantined: bool = False
    ) -> EnrolledAgent:
        """
        The agent that a sandbox which ran on without us is; its rules are in force already. Deadline and quarantine
        stay.
        """
        agent = _agent_of(sandbox, request)
        return replace(
            agent,
            policy=self._policy.policy_of(agent.key),
            bypass_until_ns=bypass_until_ns,
            quarantined=quarantined,
        )

    async def adopt(self, agent: EnrolledAgent, sandbox: SandboxLike) -> None:
        """
        Take over an `adoptee`. If the kernel refuses the row, what it had stays as it is, and the failure is raised.
        """
        self._lives[agent.id] = agent
        self._roster.put(agent)
        await self._enforcement.enroll(agent, sandbox)
        log.info("agents_adopted", id=agent.id, agent=agent.key, policy=agent.policy)

    def knows(self, sandbox_id: str) -> bool:
        """
        Whether a life of that id is being followed.
        """
        return sandbox_id in self._lives

    async def signal(self, sandbox_id: str, signo: int) -> None:
        """
        Deliver a signal to the command of a sandbox.
        """
        await self._engine.signal(self._known(sandbox_id).id, signo)

    async def finish(self, sandbox_id: str) -> int:
        """
        Wait for the command's end, take everything of the sandbox away, and return its exit code.
        """
        agent = self._known(sandbox_id)
        code = await self._engine.wait(sandbox_id)
        await self._end(agent)
        return code

    async def stop(self, sandbox_id: str, *, grace_s: float) -> None:
        """
        End a sandbox whose client went away; a sandbox that is gone already is fine.
        """
        agent = self._lives.get(sandbox_id)
        if agent is not None:
            await self._end(agent, grace_s=grace_s)

    async def retry(self) -> list[str]:
        """
        End again what could not be ended; the ids of those that have ended now.
        """
        left = [agent for agent in self._lives.values() if agent.id in self._left]
        for agent in left:
            await self._end(agent)
        return [agent.id for agent in left if agent.id not in self._lives]

    async def _end(self, agent: EnrolledAgent, *, grace_s: float = 0.0) -> None:
        while agent.id in self._ending:
            await self._ending[agent.id].wait()
        if agent.id not in self._lives:
            return
        done = self._ending[agent.id] = asyncio.Event()
        try:
            # Death first: as long as something of it may live, its row and its rules stay (I4).
            stop = partial(self._engine.stop, agent.id, grace_s=grace_s)
            if await self._contained(agent, "stop", stop, grace_s) and await self._settled_and_removed(agent):
                await self._contained(agent, "withdraw", partial(self._withdraw, agent))
                await self._contained(agent, "rules", partial(self._policy.drop_ephemeral, agent.key))
                log.info("withdrawn", id=agent.id, agent=agent.key)
                self._lives.pop(agent.id, None)
        finally:
            self._left.discard(agent.id)
            if agent.id in self._lives:
                self._left.add(agent.id)
            del self._ending[agent.id]
            done.set()

    async def _settled_and_removed(self, agent: EnrolledAgent) -> bool:
        """Let a dead sandbox's last records come while it is taken apart; whether it was."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._contained(agent, "settle", partial(self._settle, agent.id)), name="settle")
            remove = partial(self._engine.remove, agent.id, force=True, grace_s=0)
            return await self._contained(agent, "remove", remove)

    async def _contained(
        self, agent: EnrolledAgent, step: str, act: Callable[[], Awaitable[None]], more_s: float = 0.0
    ) -> bool:
        try:
            async with asyncio.timeout(END_LIMIT_S + more_s):
                await act()
        except (ClawkerError, OSError, TimeoutError) as error:
            log.warning("agents_end_step_failed", id=agent.id, step=step, error=str(error) or type(error).__name__)
            return False
        return True

    async def _withdraw(self, agent: EnrolledAgent) -> None:
        self._roster.remove(agent.id)
        await self._enforcement.withdraw(agent)

    def _known(self, sandbox_id: str) -> EnrolledAgent:
        agent = self._lives.get(sandbox_id)
        if agent is None:
            raise NotFound(f"no sandbox {sandbox_id} on this server")
        return agent


def _agent_of(sandbox: SandboxLike, request: LifeRequest) -> EnrolledAgent:
    return EnrolledAgent(
        id=sandbox.id,
        project=sandbox.project,
        agent=sandbox.agent,
        address=sandbox.address,
        cgroup_id=sandbox.cgroup_id,
        policy=0,
        learn=request.learn,
    )
