"""
One agent's enforcement: its kernel row, its published ports, its direct paths, its cuts.

Joins `ebpf.Manager`, the host engine's ring and the compiled plan, for `agents.lifecycle`
(`Enforcement`) and for the reconciler (`AgentsTarget`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.ebpf import AgentConfig, Manager
from clawker_cp.ebpf.config import InboundFrom
from clawker_cp.engines.base import Sandbox
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.engines.host.ring import Direct
from clawker_cp.engines.host.sockets import SocketInfo
from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.changes import Change
from clawker_cp.firewall.direct import passed, passes
from clawker_cp.firewall.hosts import HostTable, may_stay
from clawker_cp.firewall.plan import Plan, Policy
from clawker_cp.telemetry.connections import Connections

log = structlog.get_logger()

CONTROL_PORTS = (53, 4444, 7080, 7444)  # of the control plane, as agents see it (contract 1.3)


class HostEnforcement:
    """
    Enrols, moves, cuts and withdraws sandboxes of this host. `plan` gives the plan in force.
    """

    def __init__(
        self,
        manager: Manager,
        engine: HostEngine,
        roster: Roster,
        connections: Connections,
        *,
        plan: Callable[[], Plan],
        host_ring: bool,
        host_proxy_port: int = 0,
    ) -> None:
        self._manager = manager
        self._engine = engine
        self._roster = roster
        self._connections = connections
        self._plan = plan
        self._host_ring = host_ring
        self._host_proxy_port = host_proxy_port
        self._forget: tuple[Callable[[int], None], ...] = ()

    def tell_withdrawn(self, *forget: Callable[[int], None]) -> None:
        """
        Set who keeps something by cgroup id, and has to forget it once an agent is gone.
        """
        self._forget = forget

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
            host_proxy_addr=gateway if self._host_proxy_port else "",
            host_proxy_port=self._host_proxy_port,
            learn=agent.learn,
            quarantined=agent.quarantined,
            bypass_until_ns=agent.bypass_until_ns,
        )
        self._manager.set_inbound(agent.cgroup_id, {item.port: InboundFrom.HOST for item in sandbox.publish})
        await self._admit(agent, self._plan())
        self._manager.enroll(agent.cgroup_id, config)

    async def withdraw(self, agent: EnrolledAgent) -> None:
        """
        Remove an agent's rows; only called once nothing of it lives.
        """
        self._manager.withdraw(agent.cgroup_id)
        for forget in self._forget:
            forget(agent.cgroup_id)
        self._connections.forget(agent.address)

    async def open_until(self, agent: EnrolledAgent, until_ns: int, seconds: float) -> None:
        """
        Let an agent pass until a moment of the kernel's clock; ring, gate and kernel each end it by themselves.
        """
        if self._host_ring and not agent.learn:
            await self._engine.ring.admit_all(agent.address, seconds)
        self._roster.update(agent.id, bypass_until_ns=until_ns)
        self._manager.bypass(agent.cgroup_id, until_ns)

    async def end_bypass(self, agent: EnrolledAgent) -> int:
        """
        Judge an agent by its policy again, now; returns how many of its connections that cut.
        """
        self._manager.bypass(agent.cgroup_id, 0)
        self._roster.update(agent.id, bypass_until_ns=0)
        if self._host_ring and not agent.learn:
            await self._engine.ring.end_all(agent.address)
        return await self.cut_unruled(agent)

    async def cut_unruled(self, agent: EnrolledAgent) -> int:
        """
        Destroy direct connections that the policy in force does not pass, as after a bypass.
        """
        if agent.learn:
            return 0
        plan, gateway = self._plan(), self._engine.gateway

        def unruled(info: SocketInfo) -> bool:
            if info.destination == gateway or info.destination.startswith("127.") or ":" in info.destination:
                return False
            return not passes(plan, agent.policy, info.protocol, info.destination, info.destination_port)

        return await self._cut(agent, unruled, "bypass")

    async def isolate(self, agent: EnrolledAgent) -> int:
        """
        Leave an agent nothing but the control plane; returns how many of its connections that cut.
        """
        self._roster.update(agent.id, quarantined=True, bypass_until_ns=0)
        self._manager.quarantine(agent.cgroup_id, on=True)
        self._manager.bypass(agent.cgroup_id, 0)
        if self._host_ring:
            await self._engine.ring.end_all(agent.address)
            await self._engine.ring.admit(agent.address, [])
        gateway = self._engine.gateway

        def outside(info: SocketInfo) -> bool:
            if info.destination.startswith("127."):
                return False
            return (info.destination, info.destination_port) not in {(gateway, port) for port in CONTROL_PORTS}

        return await self._cut(agent, outside, "quarantine")

    async def restore(self, agent: EnrolledAgent) -> None:
        """
        Give a quarantined agent its policy back.
        """
        free = self._roster.update(agent.id, quarantined=False) or agent
        await self._admit(free, self._plan())
        self._manager.quarantine(agent.cgroup_id, on=False)

    def enrolled(self, agent: EnrolledAgent) -> bool:
        """
        Whether the kernel has an agent's row, asked now.
        """
        return agent.cgroup_id in self._manager.agents()

    async def _cut(self, agent: EnrolledAgent, match: Callable[[SocketInfo], bool], cause: str) -> int:
        try:
            count = await self._engine.cut(agent.id, match)
        except (ClawkerError, OSError) as error:
            log.warning("connections_not_cut", id=agent.id[:12], cause=str(error))
            return 0
        if count:
            log.info("connections_cut", count=count, cause=cause, id=agent.id[:12])
        return count

    async def set_policies(self, policies: Mapping[str, int], /) -> None:
        """
        Move agents, by scope key, to other policy numbers.
        """
        for key, number in policies.items():
            for agent in self._roster.with_key(key):
                self._manager.set_policy(agent.cgroup_id, number)
                self._roster.update(agent.id, policy=number)

    async def admit(self, plan: Plan, /) -> None:
        """
        Bring the ring to what a plan passes directly.
        """
        for agent in self._roster:
            await self._admit(agent, plan)

    async def cut(self, change: Change, /) -> int:
        """
        Destroy what a change forbids; one sandbox's failure is logged and leaves the others' done.
        """
        count = 0
        for agent in self._roster:
            before, after = change.moved.get(agent.key, (agent.policy, agent.policy))
            old, new = change.old.policies.get(before), change.new.policies.get(after)
            if agent.learn or agent.bypassed or old is None or new is None:
                continue
            if old == new and not change.moved.get(agent.key) and change.old.cidrs == change.new.cidrs:
                continue
            try:
                count += await self._engine.cut(agent.id, self._doomed(agent, old, new, change.new))
            except (ClawkerError, OSError) as error:
                log.warning("connections_not_cut", id=agent.id[:12], cause=str(error))
        if count:
            log.info("connections_cut", count=count, cause="rule")
        return count

    def _doomed(self, agent: EnrolledAgent, old: Policy, new: Policy, plan: Plan) -> Callable[[SocketInfo], bool]:
        """
        Which of an agent's sockets have no permission left: proxied ones by what the proxy last said
        of them or by their listener, direct ones by their address.
        """
        gateway = self._engine.gateway
        old_hosts, new_hosts = HostTable.of(old), HostTable.of(new)
        forbidden = {
            (source, live.listener)
            for source, live in self._connections.of(agent.address).items()
            if live.listener in _http_listeners(old)
            and not may_stay(old_hosts, new_hosts, live.host, live.port, tls=live.tls)
        }
        gone = _listeners(old) - _listeners(new)

        def doomed(info: SocketInfo) -> bool:
            if info.destination == gateway:
                return info.destination_port in gone or (info.source_port, info.destination_port) in forbidden
            if info.destination.startswith("127.") or ":" in info.destination:
                return False
            return not passes(plan, new.id, info.protocol, info.destination, info.destination_port)

        return doomed

    async def _admit(self, agent: EnrolledAgent, plan: Plan) -> None:
        if not self._host_ring or agent.quarantined:
            return
        if agent.learn:
            await self._engine.ring.admit_all(agent.address, None)
        direct = [Direct(str(one.network), one.l4, one.low, one.high) for one in passed(plan, agent.policy)]
        await self._engine.ring.admit(agent.address, direct)


def _http_listeners(policy: Policy) -> set[int]:
    """Ports on which the proxy reads the name, so that its record decides."""
    return {policy.egress_port, *(origin.listen for origin in policy.origins if origin.listen)}


def _listeners(policy: Policy) -> set[int]:
    """Every proxy port of a policy."""
    return {*_http_listeners(policy), *(target.listen for target in policy.opaque)}
