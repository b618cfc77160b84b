"""
Agents of the host engine as the server has them: sandboxes of `run` clients and the server's own.

Adopts what an earlier server left, opens the socket that `run` joins, and says when the last one is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import structlog

from clawker_cp.agents.database import Database
from clawker_cp.agents.directory import by_container
from clawker_cp.agents.lifecycle import SandboxLives
from clawker_cp.agents.quarantines import Quarantines
from clawker_cp.agents.roster import EnrolledAgent, Roster, RosterResolver
from clawker_cp.agents.sandbox_rows import SandboxRows
from clawker_cp.config import Directories, Settings
from clawker_cp.ebpf import Manager
from clawker_cp.engines.base import AgentNetwork, Sandbox
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.reconcile import Reconciler
from clawker_cp.firewall.rules import agent_scope
from clawker_cp.rpc.local_protocol import SOCKET_NAME
from clawker_cp.rpc.local_server import ORPHAN_GRACE_S, LocalServer
from clawker_cp.wiring.agent_control import AgentControl
from clawker_cp.wiring.agent_side import Part
from clawker_cp.wiring.enforcement import Enforcement
from clawker_cp.wiring.reports import Reports
from clawker_cp.wiring.sandbox_service import SandboxService
from clawker_cp.wiring.translation import adopted_request, life_request

log = structlog.get_logger()

RETRY_S = 5.0
UNCLAIMED_S = 30.0  # how long an adopted sandbox waits for its client, and a server for its first


class HostAgents:
    """
    Fulfils `agent_side.AgentSide` with sandboxes. `idle` is called whenever the last sandbox and client are gone.
    """

    name = "host"

    def __init__(
        self,
        engine: HostEngine,
        settings: Settings,
        directories: Directories,
        policy: Reconciler,
        manager: Manager,
        enforcement: Enforcement,
        roster: Roster,
        reports: Reports,
        database: Database,
        quarantines: Quarantines,
        *,
        require_up: Callable[[], None],
        idle: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._enforcement = enforcement
        self._manager = manager
        self._reports = reports
        self._quarantines = quarantines
        self._idle = idle
        self._adopted: list[Sandbox] = []
        self._lives = SandboxLives(engine, policy, enforcement, roster, reports.settle)
        self._lives.require(require_up)
        self._local = LocalServer(
            directories.state / SOCKET_NAME,
            self._lives,
            reports,
            partial(life_request, inbound=settings.firewall.inbound),
        )
        self.sandboxes = SandboxService(
            self._lives,
            SandboxRows(database),
            roster,
            require_up=require_up,
            gone=self._gone,
            living=engine.living,
            exit_code=engine.exit_code,
        )
        self.resolver = RosterResolver(roster)

    @property
    def network(self) -> AgentNetwork:
        return self._engine.network

    def living(self) -> Sequence[Sandbox]:
        return self._engine.living()

    async def running(self) -> Sequence[Sandbox]:
        return self._engine.living()

    async def find(self, reference: str) -> Sandbox:
        return by_container(reference, self._engine.living())

    def exposures(self, _agent_id: str) -> Sequence[str]:
        """A sandbox is given no way out by its owner."""
        return ()

    def denied(self) -> Sequence[Sandbox]:
        """A sandbox that cannot be enrolled is never started."""
        return ()

    def failures(self) -> Mapping[str, str]:
        return {}

    async def prepare(self) -> None:
        await self._engine.start()
        self._adopted = self._engine.living()
        for sandbox in self._adopted:
            request = adopted_request(sandbox.spec)
            self._policy.preload(agent_scope(sandbox.project, sandbox.agent), request.rules, learn=request.learn)

    async def cgroups(self) -> set[int]:
        return {sandbox.cgroup_id for sandbox in self._engine.living()}

    async def enrol_all(self) -> None:
        """Nothing: what runs is enrolled from its creation on."""

    async def see_neighbour(self, container_id: str, /) -> None:
        """Nothing: there are no containers on this bridge."""

    def parts(self) -> list[Part]:
        return [
            ("sandboxes", self.sandboxes.run, "no sandbox can be created"),
            ("ends_retried", self._retry_ends, "a sandbox that could not be taken away stays, enforced"),
        ]

    async def take_over(self, group: asyncio.TaskGroup, agents: AgentControl) -> list[asyncio.Task[None]]:
        await self.sandboxes.wait_running()
        await asyncio.to_thread(self.sandboxes.settle)
        adoptees = [(agent, one) for one in self._adopted if (agent := await self._adoptee(one)) is not None]
        try:
            # One transaction for all; what each is enrolled with is then there already.
            await self._enforcement.admit_coming([agent for agent, _ in adoptees])
        except ClawkerError as error:
            log.warning("agents_not_admitted_together", cause=str(error), effect="each is by itself")
        for agent, sandbox in adoptees:
            await self._adopt(agent, sandbox, agents)
        self._local.open()
        running = [
            group.create_task(self._local.serve(self._gone), name="local"),
            group.create_task(self._await_client(), name="unclaimed"),
        ]
        owned = {sandbox.id for sandbox in self._adopted if self.sandboxes.adopt(sandbox)}
        return running + [
            group.create_task(self._follow_adopted(sandbox.id), name="adopted")
            for sandbox in self._adopted
            if sandbox.id not in owned
        ]

    def close(self) -> None:
        self._local.close()

    def stages(self, *, empty: bool) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        return [("engine", partial(self._engine.aclose, remove=empty))]

    # -- inner -------------------------------------------------------------------------------

    async def _adoptee(self, sandbox: Sandbox) -> EnrolledAgent | None:
        """The agent that a sandbox is; None, said, for one that is left as the kernel has it."""
        row = self._manager.agents().get(sandbox.cgroup_id)
        try:
            quarantined = await asyncio.to_thread(self._quarantines.get, sandbox.id)
        except ClawkerError as error:
            log.error("enroll_failed", id=sandbox.id[:12], cause=str(error))
            return None
        return self._lives.adoptee(
            sandbox,
            adopted_request(sandbox.spec),
            bypass_until_ns=row.bypass_until_ns if row is not None else 0,
            quarantined=quarantined is not None,
        )

    async def _adopt(self, agent: EnrolledAgent, sandbox: Sandbox, agents: AgentControl) -> None:
        """Take one sandbox over; one that cannot be is left as the kernel has it and does not stop the others."""
        try:
            await self._lives.adopt(agent, sandbox)
            agents.follow_bypass(agent)
            await self._enforcement.cut_strangers(agent)
        except ClawkerError as error:
            log.error("enroll_failed", id=sandbox.id[:12], cause=str(error))

    async def _retry_ends(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            ended = await self._lives.retry()
            for sandbox_id in self._engine.left():
                # One whose creation failed has no life.
                if not self._lives.knows(sandbox_id):
                    try:
                        await self._engine.remove(sandbox_id, force=True, grace_s=0)
                    except (ClawkerError, OSError) as error:
                        log.warning("sandbox_remains", id=sandbox_id[:12], cause=str(error))
            if ended:
                await asyncio.to_thread(self.sandboxes.ended_late, ended)
                self._gone()

    async def _await_client(self) -> None:
        """Whoever started this server may have died before it came: there is nobody then whose going is told."""
        await asyncio.sleep(UNCLAIMED_S)
        self._gone()

    async def _follow_adopted(self, sandbox_id: str) -> None:
        """Take an adopted sandbox apart at its end; end it if nobody comes back for it."""
        try:
            async with asyncio.TaskGroup() as group:
                finishing = group.create_task(self._lives.finish(sandbox_id), name="adopted-end")
                await asyncio.wait([finishing], timeout=UNCLAIMED_S)
                if not finishing.done() and not self._local.attached(sandbox_id):
                    log.warning("agents_adopted_unclaimed", id=sandbox_id[:12])
                    await self._lives.stop(sandbox_id, grace_s=ORPHAN_GRACE_S)
        except* ClawkerError as group_error:
            log.info("agents_adopted_gone", id=sandbox_id[:12], cause=str(group_error.exceptions[0]))
        self._reports.ending(sandbox_id)
        self._gone()

    def _gone(self) -> None:
        if self._local.idle and not len(self._lives):
            self._idle()
