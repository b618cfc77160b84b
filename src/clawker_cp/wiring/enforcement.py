"""
One agent's enforcement: its kernel row, its published ports, its direct paths, its cuts.

Joins `ebpf.Manager`, an engine, the ring around its bridge and the compiled plan, for `agents.lifecycle` and
`agents.container_lives` (`Enforcement`) and for the reconciler (`AgentsTarget`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import structlog

from clawker_cp.agents.directory import Named
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.ebpf import AgentConfig, Manager
from clawker_cp.ebpf.config import InboundFrom
from clawker_cp.engines.base import AgentNetwork, Publish
from clawker_cp.engines.host.direct import Admitted, Direct
from clawker_cp.engines.host.sockets import SocketInfo
from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.allocations import EGRESS_GLOBAL, NEVER
from clawker_cp.firewall.changes import Change
from clawker_cp.firewall.direct import passed
from clawker_cp.firewall.plan import Plan
from clawker_cp.telemetry.connections import Connections
from clawker_cp.wiring.policy_move import PolicyMove, listeners, unpassed

log = structlog.get_logger()

CONTROL_PORTS = (4444, 7080, 7444)  # of the control plane, as agents see it (contract 1.3)
PROXY_PORTS = range(EGRESS_GLOBAL, 32000)  # every band of contract 1.1
INBOUND = {"host": InboundFrom.HOST, "published": InboundFrom.ANY}


class Living(Named, Protocol):
    """What an engine tells of an agent that runs: a sandbox or a container."""

    @property
    def publish(self) -> Sequence[Publish]: ...


class Ring(Protocol):
    """The ring around the agents' bridge."""

    async def admit_each(self, wanted: Mapping[str, Admitted]) -> None: ...
    async def admit_all(self, address: str, seconds: float | None) -> None: ...
    async def end_all(self, address: str) -> None: ...


class EngineLike(Protocol):
    """An engine, as far as enforcement needs one."""

    @property
    def network(self) -> AgentNetwork: ...
    async def cut(self, agent_id: str, match: Callable[[SocketInfo], bool], /) -> int: ...


class Enforcement:
    """
    Enrols, moves, cuts and withdraws agents. `plan` gives the plan in force; `ring` None: there is none.

    `inbound` is `firewall.inbound`: who may connect to ports the owner published. `session_port`: where the
    control plane may connect to an agent (contract 1.3), 0 = nowhere.
    """

    def __init__(
        self,
        manager: Manager,
        engine: EngineLike,
        ring: Ring | None,
        roster: Roster,
        connections: Connections,
        *,
        plan: Callable[[], Plan],
        host_proxy_port: int = 0,
        inbound: str = "host",
        session_port: int = 0,
    ) -> None:
        self._manager = manager
        self._engine = engine
        self._ring = ring
        self._roster = roster
        self._connections = connections
        self._plan = plan
        self._host_proxy_port = host_proxy_port
        self._inbound = INBOUND.get(inbound)
        self._session_port = session_port
        self._forget: tuple[Callable[[int], None], ...] = ()

    def tell_withdrawn(self, *forget: Callable[[int], None]) -> None:
        """
        Set who keeps something by cgroup id, and has to forget it once an agent is gone.
        """
        self._forget = forget

    async def enroll(self, agent: EnrolledAgent, living: Living) -> None:
        """
        Write everything the kernel needs; returns when it holds.
        """
        network = self._engine.network
        proxy_port = self._host_proxy_port if network.host_proxy else 0
        config = AgentConfig(
            policy=agent.policy,
            proxy_addr=network.proxy,
            dns_addr=network.dns,
            cp_addr=network.cp,
            host_addr=network.gateway,
            host_proxy_addr=network.host_proxy if proxy_port else "",
            host_proxy_port=proxy_port,
            learn=agent.learn,
            quarantined=agent.quarantined,
            bypass_until_ns=agent.bypass_until_ns,
        )
        self._manager.set_inbound(agent.cgroup_id, self._open_ports(living))
        await self._admit(agent)
        self._manager.enroll(agent.cgroup_id, config)

    def _open_ports(self, living: Living) -> dict[int, InboundFrom]:
        ports = {} if self._inbound is None else {item.port: self._inbound for item in living.publish}
        if self._session_port:
            ports[self._session_port] = InboundFrom.CONTROL_PLANE
        return ports

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
        Let an agent pass until a moment of the kernel's clock; ring, gate and kernel each end it by themselves. One
        that fails leaves nothing open.
        """
        try:
            if self._ring is not None and not agent.learn:
                await self._ring.admit_all(agent.address, seconds)
            self._manager.bypass(agent.cgroup_id, until_ns)
        except BaseException:
            # The ring may have opened without telling, or alone.
            if self._ring is not None and not agent.learn:
                await self._ring.end_all(agent.address)
            raise
        self._roster.update(agent.id, bypass_until_ns=until_ns)

    async def end_bypass(self, agent: EnrolledAgent) -> int:
        """
        Judge an agent by its policy again, now; returns how many of its connections that cut.
        """
        self._manager.bypass(agent.cgroup_id, 0)
        self._roster.update(agent.id, bypass_until_ns=0)
        if self._ring is not None and not agent.learn:
            await self._ring.end_all(agent.address)
        return await self.cut_unruled(agent)

    async def cut_unruled(self, agent: EnrolledAgent) -> int:
        """
        Destroy connections that the policy in force does not pass, as after a bypass: direct ones, and those through
        the proxy whose rules went meanwhile, for a change spares who is bypassed.
        """
        if agent.learn:
            return 0
        plan, network = self._plan(), self._engine.network
        move = PolicyMove.of(agent.policy, agent.policy, Change(plan, plan, {}, ()), network)
        stranger = self._stranger(plan, agent.policy)
        if move is None:
            forbidden = unpassed(plan, agent.policy, network)
        else:
            forbidden = move.doomed(self._connections.of(agent.address))
        return await self._cut(agent, lambda info: stranger(info) or forbidden(info), "bypass")

    async def cut_strangers(self, agent: EnrolledAgent) -> int:
        """
        Destroy connections to listeners that an adopted agent's policy does not have: the kernel lets those pass
        that were made under an earlier policy, and who judged them may have died in the middle of a change.
        """
        return await self._cut(agent, self._stranger(self._plan(), agent.policy), "rule")

    def _stranger(self, plan: Plan, number: int) -> Callable[[SocketInfo], bool]:
        """Say which sockets lead to a listener that is not of a policy."""
        policy = plan.policies.get(number)
        ports, proxy = listeners(policy) if policy is not None else set(), self._engine.network.proxy

        def stranger(info: SocketInfo) -> bool:
            port = info.destination_port
            return info.destination == proxy and port in PROXY_PORTS and port not in NEVER and port not in ports

        return stranger

    async def isolate(self, agent: EnrolledAgent) -> int:
        """
        Leave an agent nothing but the control plane; returns how many of its connections that cut.
        """
        self._roster.update(agent.id, quarantined=True, bypass_until_ns=0)
        self._manager.quarantine(agent.cgroup_id, on=True)
        self._manager.bypass(agent.cgroup_id, 0)
        if self._ring is not None:
            await self._ring.end_all(agent.address)
            await self._admit_all(self._plan(), at=agent.address)
        network = self._engine.network
        kept = {(network.dns, 53), *((network.cp, port) for port in CONTROL_PORTS)}

        def outside(info: SocketInfo) -> bool:
            if info.destination.startswith("127."):
                return False
            return (info.destination, info.destination_port) not in kept

        return await self._cut(agent, outside, "quarantine")

    async def restore(self, agent: EnrolledAgent) -> None:
        """
        Give a quarantined agent its policy back.
        """
        free = self._roster.update(agent.id, quarantined=False) or agent
        await self._admit(free)
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
        await self._admit_all(self._plan())

    async def admit(self, plan: Plan, /) -> None:
        """
        Bring the ring to what a plan passes directly.
        """
        # Until their rows are moved agents are sent to listeners of the policy they leave.
        await self._admit_all(plan, moving=True)

    async def cut(self, change: Change, /) -> int:
        """
        Destroy what a change forbids; one sandbox's failure is logged and leaves the others' done.
        """
        count = 0
        moves: dict[tuple[int, int], PolicyMove | None] = {}
        for agent in self._roster:
            if agent.learn or agent.bypassed:
                continue
            numbers = change.moved.get(agent.key, (agent.policy, agent.policy))
            if numbers not in moves:
                moves[numbers] = PolicyMove.of(*numbers, change, self._engine.network)
            move, living = moves[numbers], self._connections.of(agent.address)
            if move is None or not move.concerns(living):
                continue
            try:
                count += await self._engine.cut(agent.id, move.doomed(living))
            except (ClawkerError, OSError) as error:
                log.warning("connections_not_cut", id=agent.id[:12], cause=str(error))
        if count:
            log.info("connections_cut", count=count, cause="rule")
        return count

    async def admit_coming(self, coming: Sequence[EnrolledAgent]) -> None:
        """
        Bring the ring to what these may begin, in one transaction, before each is enrolled.
        """
        if coming:
            await self._admit_all(self._plan(), coming=coming)

    async def readmit(self, address: str) -> None:
        """
        Bring the ring to what agents at an address may begin, after its port was pinned.
        """
        await self._admit_all(self._plan(), at=address)

    async def _admit(self, agent: EnrolledAgent) -> None:
        if self._ring is None or agent.quarantined:
            return
        if agent.learn:
            await self._ring.admit_all(agent.address, None)
        await self._admit_all(self._plan(), at=agent.address, coming=[agent])

    async def _admit_all(
        self, plan: Plan, *, moving: bool = False, at: str = "", coming: Sequence[EnrolledAgent] = ()
    ) -> None:
        """Admit every agent, or those `at` an address, those that are not known yet included."""
        if self._ring is None:
            return
        wanted: dict[str, set[int]] = {at: set()} if at else {}
        for agent in [*self._roster, *coming]:
            if at in {"", agent.address}:
                numbers = {agent.policy, plan.agents.get(agent.key, agent.policy)} if moving else {agent.policy}
                wanted.setdefault(agent.address, set()).update(set() if agent.quarantined else numbers)
        known: dict[frozenset[int], Admitted] = {}
        for numbers in wanted.values():
            if frozenset(numbers) not in known:
                known[frozenset(numbers)] = _admitted(plan, numbers)
        await self._ring.admit_each({address: known[frozenset(numbers)] for address, numbers in wanted.items()})


def _admitted(plan: Plan, policies: Collection[int]) -> Admitted:
    """What the ring lets agents of these policies begin."""
    direct = [Direct(str(one.network), one.l4, one.low, one.high) for id_ in policies for one in passed(plan, id_)]
    return Admitted(tuple(direct), frozenset((row.l4, row.port) for row in plan.proxy_ports if row.policy in policies))
