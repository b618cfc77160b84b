"""
One agent's enforcement: its kernel row, its published ports, its direct paths, its cuts.

Joins `ebpf.Manager`, the host engine's ring and the compiled plan for `agents.lifecycle`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.ebpf import AgentConfig, Manager
from clawker_cp.ebpf.config import InboundFrom
from clawker_cp.engines.base import Sandbox
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.engines.host.ring import Direct
from clawker_cp.engines.host.sockets import SocketInfo
from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.hosts import HostTable, may_stay
from clawker_cp.firewall.plan import Plan, RouteAction
from clawker_cp.telemetry.connections import Connections
from clawker_cp.wiring.policy import Change

log = structlog.get_logger()


class HostEnforcement:
    """
    Enrols and withdraws sandboxes of this host.
    """

    def __init__(
        self, manager: Manager, engine: HostEngine, roster: Roster, connections: Connections, *, host_ring: bool
    ) -> None:
        self._manager = manager
        self._engine = engine
        self._roster = roster
        self._connections = connections
        self._host_ring = host_ring
        self._plan: Plan | None = None
        self._gate: Any = None

    def use(self, plan: Plan, gate: Any) -> None:
        """
        Tell which plan is in force at start, and which gate remembers answers.
        """
        self._plan = plan
        self._gate = gate

    async def enroll(self, agent: EnrolledAgent, sandbox: Sandbox) -> None:
        """
        Write everything the kernel needs before the first process; returns when it holds.
        """
        gateway = self._engine.gateway
        config = AgentConfig(
            policy=agent.policy,
            proxy_addr=gateway,
            dns_addr=gateway,
            cp_addr=gateway,
            host_addr=gateway,
            learn=agent.learn,
            quarantined=agent.quarantined,
            bypass_until_ns=agent.bypass_until_ns,
        )
        self._manager.set_inbound(agent.cgroup_id, {item.port: InboundFrom.HOST for item in sandbox.publish})
        await self._admit(agent)
        self._manager.enroll(agent.cgroup_id, config)

    async def withdraw(self, agent: EnrolledAgent) -> None:
        """
        Remove an agent's rows; only called once nothing of it lives.
        """
        self._manager.withdraw(agent.cgroup_id)
        if self._gate is not None:
            self._gate.forget(agent.cgroup_id)
        self._connections.forget(agent.address)

    async def on_change(self, change: Change) -> None:
        """
        Give agents their policy of a new plan and cut what it forbids.
        """
        self._plan = change.after
        for agent in self._roster:
            policy = change.after.agents.get(agent.key, 1)
            if policy != agent.policy:
                self._manager.set_policy(agent.cgroup_id, policy)
                self._roster.update(agent.id, policy=policy)
            await self._admit(agent, policy)
            try:
                count = await self._cut(agent, change, agent.policy, policy)
            except (ClawkerError, OSError) as error:
                log.warning("connections_not_cut", id=agent.id[:12], cause=str(error))
                continue
            if count:
                log.info("connections_cut", id=agent.id[:12], count=count, cause="rule")

    async def _admit(self, agent: EnrolledAgent, policy: int | None = None) -> None:
        if not self._host_ring or self._plan is None:
            return
        number = agent.policy if policy is None else policy
        if agent.learn:
            await self._engine.ring.admit_all(agent.address, None)
        direct = [
            Direct(str(row.prefix), row.l4, span.low, span.high)
            for row in self._plan.cidrs.values()
            if row.policy == number
            for span in row.spans
            if span.action == RouteAction.PASS
        ]
        await self._engine.ring.admit(agent.address, direct)

    async def _cut(self, agent: EnrolledAgent, change: Change, old_number: int, new_number: int) -> int:
        old, new = change.before.policies.get(old_number), change.after.policies.get(new_number)
        if old is None or new is None or (old == new and old_number == new_number):
            return 0
        old_hosts, new_hosts = HostTable.of(old), HostTable.of(new)
        kept = {target.listen for target in new.opaque} | {origin.listen for origin in new.origins}
        kept.add(new.egress_port)
        forbidden = {
            source_port
            for source_port, (host, port, tls) in self._connections.of(agent.address).items()
            if not may_stay(old_hosts, new_hosts, host, port, tls=tls)
        }
        gateway = self._engine.gateway
        opaque_before = {target.listen for target in old.opaque} | {old.egress_port}
        gone = opaque_before - kept

        def doomed(info: SocketInfo) -> bool:
            if info.destination == gateway:
                return info.destination_port in gone or info.source_port in forbidden
            return False

        if not gone and not forbidden:
            return 0
        return await asyncio.shield(self._engine.cut(agent.id, doomed))
