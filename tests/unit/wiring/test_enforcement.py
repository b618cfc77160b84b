"""One agent's enforcement: rows in the real kernel maps, what the ring lets it begin, and which connections are cut."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from clawker_cp._fast import layout
from clawker_cp._fast.bpfmap import BpfMap
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.ebpf.config import InboundFrom
from clawker_cp.ebpf.manager import Manager
from clawker_cp.engines.base import AgentNetwork, Publish
from clawker_cp.engines.host.direct import Admitted, Direct
from clawker_cp.engines.host.sockets import SocketInfo
from clawker_cp.errors import Conflict, DeadlineExceeded, Unavailable
from clawker_cp.firewall.changes import Change
from clawker_cp.firewall.compile import Compiled
from clawker_cp.firewall.plan import TCP, UDP
from clawker_cp.telemetry.connections import Connections, Live
from clawker_cp.testing.bridge_world import GATEWAY, ON_HOST, SUBNET
from clawker_cp.testing.plan_world import build, rule
from clawker_cp.testing.socket_world import remove_cgroup
from clawker_cp.testing.world import cgroup2_mount
from clawker_cp.wiring.enforcement import Enforcement

pytestmark = pytest.mark.root

NETWORK = AgentNetwork("n", SUBNET, GATEWAY, "b", host_proxy=GATEWAY, **ON_HOST)
NEVER = 1 << 62  # later than any moment of the kernel's clock
ONE = EnrolledAgent("a" * 64, "p", "one", "10.231.96.5", 4242, 1)
TWO = EnrolledAgent("b" * 64, "p", "two", "10.231.96.6", 4243, 1)


@dataclass
class Running:
    """What the engine tells of an agent."""

    id: str = ONE.id
    project: str = "p"
    agent: str = "one"
    publish: tuple[Publish, ...] = ()


class Sockets:
    """An engine whose agents have the sockets that the test says; cutting one takes it away."""

    def __init__(self) -> None:
        self.network = NETWORK
        self.of: dict[str, list[SocketInfo]] = {}
        self.refuse: set[str] = set()

    def open(self, agent: EnrolledAgent, destination: str, port: int, source: int = 40000, protocol: int = TCP) -> None:
        self.of.setdefault(agent.id, []).append(SocketInfo(protocol, agent.address, source, destination, port))

    async def cut(self, agent_id: str, match: Callable[[SocketInfo], bool], /) -> int:
        if agent_id in self.refuse:
            raise Unavailable("its namespace is gone")
        held = self.of.get(agent_id, [])
        self.of[agent_id] = [one for one in held if not match(one)]
        return len(held) - len(self.of[agent_id])

    def left(self, agent: EnrolledAgent) -> list[tuple[str, int]]:
        return [(one.destination, one.destination_port) for one in self.of.get(agent.id, [])]


class Ring:
    """Keeps what each address may begin: by rules, and everything for a time."""

    def __init__(self) -> None:
        self.admitted: dict[str, Admitted] = {}
        self.open: dict[str, float | None] = {}
        self.late = False
        self.transactions = 0

    async def admit_each(self, wanted: Mapping[str, Admitted]) -> None:
        self.admitted.update(wanted)
        self.transactions += 1

    async def admit_all(self, address: str, seconds: float | None) -> None:
        self.open[address] = seconds
        if self.late:
            raise DeadlineExceeded("nft did not end")

    async def end_all(self, address: str) -> None:
        self.open.pop(address, None)


class World:
    def __init__(self, manager: Manager, pins: Path) -> None:
        self.manager, self.pins = manager, pins
        self.engine, self.ring, self.roster, self.connections = Sockets(), Ring(), Roster(), Connections()
        self.compiled = build(rule("https://x.com"), rule("tcp://198.51.100.0/24:5432"))
        self.enforcement = self.made()

    def made(self, **options: Any) -> Enforcement:
        return Enforcement(
            self.manager, self.engine, self.ring, self.roster, self.connections, plan=lambda: self.compiled.plan,
            **options,
        )  # fmt: skip

    async def enroll(self, *agents: EnrolledAgent) -> None:
        for agent in agents:
            await self.enforcement.enroll(agent, Running(agent.id, agent=agent.agent))
            self.roster.put(agent)

    def known(self, agent: EnrolledAgent) -> EnrolledAgent:
        found = self.roster.by_id(agent.id)
        assert found is not None
        return found

    def inbound(self, agent: EnrolledAgent) -> dict[int, InboundFrom]:
        rows = BpfMap.pinned(str(self.pins / "inbound_map"), *layout.SIZES["inbound_map"])
        found = {layout.unpack_inbound(key): InboundFrom(int.from_bytes(who, "little")) for key, who in rows.items()}
        rows.close()
        return {port: who for (owner, port), who in found.items() if owner == agent.cgroup_id}

    def carries(self, agent: EnrolledAgent, host: str, listener: int, source: int = 40000) -> None:
        """The proxy has said what a connection carries, and it lives."""
        self.connections.see(f"{agent.address}:{source}", Live(host, 443, True, listener))
        self.engine.open(agent, GATEWAY, listener, source)

    async def change(self, new: Compiled, moved: Mapping[str, tuple[int, int]] | None = None) -> int:
        """Put another plan in force, and cut what it forbids."""
        old, self.compiled = self.compiled, new
        return await self.enforcement.cut(Change(old.plan, new.plan, moved or {}, ()))

    @property
    def egress(self) -> int:
        return self.compiled.plan.policies[1].egress_port


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Manager, Path]]:
    """The kernel's maps, below a cgroup and pins of this module's own."""
    name = f"cke{os.getpid()}-{secrets.token_hex(2)}"
    cgroup, pins = cgroup2_mount() / name, Path("/sys/fs/bpf") / name
    cgroup.mkdir()
    made = Manager(pins, max_agents=64)
    try:
        made.load(cgroup)
        yield made, pins
    finally:
        made.close()
        Manager(pins).flush(force=True)
        remove_cgroup(cgroup)


@pytest.fixture
def world(loaded: tuple[Manager, Path]) -> Iterator[World]:
    made = World(*loaded)
    yield made
    for cgroup_id in made.manager.agents():
        made.manager.withdraw(cgroup_id)


async def test_a_row_says_where_its_agent_is_served(world: World) -> None:
    """Addresses, policy and state are in the kernel when enrolment returns; the host proxy only with a port."""
    await world.enroll(replace(ONE, quarantined=True, bypass_until_ns=7))
    row = world.manager.agents()[ONE.cgroup_id]
    assert (row.policy, row.proxy_addr, row.dns_addr, row.cp_addr, row.host_addr) == (1, *[GATEWAY] * 4)
    assert (row.quarantined, row.bypass_until_ns, row.learn) == (True, 7, False)
    assert (row.host_proxy_addr, row.host_proxy_port) == ("", 0)
    assert world.enforcement.enrolled(ONE) and not world.enforcement.enrolled(TWO)

    world.enforcement = world.made(host_proxy_port=18374)
    await world.enroll(TWO)
    row = world.manager.agents()[TWO.cgroup_id]
    assert (row.host_proxy_addr, row.host_proxy_port) == (GATEWAY, 18374)


@pytest.mark.parametrize(
    ("inbound", "published"), [("host", InboundFrom.HOST), ("published", InboundFrom.ANY), ("none", None)]
)
async def test_published_ports_are_open_to_whom_the_setting_says(
    world: World, inbound: str, published: InboundFrom | None
) -> None:
    """The session's port is the control plane's alone, also where the owner published it; others close (R33)."""
    world.enforcement = world.made(inbound=inbound, session_port=7700)
    await world.enforcement.enroll(ONE, Running(publish=(Publish(8080, 80), Publish(7701, 7700))))
    expected = {7700: InboundFrom.CONTROL_PLANE} | ({80: published} if published is not None else {})
    assert world.inbound(ONE) == expected
    await world.enforcement.enroll(ONE, Running())
    assert world.inbound(ONE) == {7700: InboundFrom.CONTROL_PLANE}


async def test_the_ring_admits_an_agents_own_rules_and_listeners(world: World) -> None:
    """Address rules and listeners of its policy; nothing while quarantined, everything while it is learnt."""
    await world.enroll(ONE, replace(TWO, quarantined=True))
    admitted = world.ring.admitted[ONE.address]
    assert admitted.direct == (Direct("198.51.100.0/24", TCP, 5432, 5432),)
    assert (TCP, world.egress) in admitted.listeners
    assert TWO.address not in world.ring.admitted and world.ring.open == {}
    await world.enroll(replace(TWO, learn=True))
    assert world.ring.open == {TWO.address: None}


async def test_agents_behind_one_address_share_what_either_may_begin(world: World) -> None:
    """Containers of one network namespace have one port: it admits both policies, less those of a quarantined one."""
    world.compiled = build(rule("https://x.com"), rule("tcp://203.0.113.0/28:25", scope=TWO.key), agents=[TWO.key])
    number = world.compiled.plan.agents[TWO.key]
    shared = replace(TWO, address=ONE.address, policy=number)
    await world.enroll(ONE, shared)
    mail = Direct("203.0.113.0/28", TCP, 25, 25)
    own = {(row.l4, row.port) for row in world.compiled.plan.proxy_ports if row.policy == 1}
    assert mail in world.ring.admitted[ONE.address].direct and own <= world.ring.admitted[ONE.address].listeners
    await world.enforcement.isolate(shared)
    assert world.ring.admitted[ONE.address].direct == ()
    assert world.ring.admitted[ONE.address].listeners == own


async def test_agents_that_are_adopted_together_are_one_transaction_of_the_ring(world: World) -> None:
    """Each has the listeners of its policy before it is enrolled; for nobody nothing is asked."""
    await world.enforcement.admit_coming([])
    assert world.ring.transactions == 0
    await world.enforcement.admit_coming([ONE, replace(TWO, quarantined=True)])
    assert world.ring.transactions == 1
    assert (TCP, world.egress) in world.ring.admitted[ONE.address].listeners
    assert world.ring.admitted[TWO.address] == Admitted() and world.manager.agents() == {}


async def test_a_move_admits_both_policies_until_the_rows_have_moved(world: World) -> None:
    """Ring before rows: agents are sent to listeners of the policy they leave until every row says the new one."""
    await world.enroll(ONE)
    before = world.egress
    new = build(rule("https://x.com"), rule("https://y.com", scope=ONE.key), agents=[ONE.key],
                allocations=world.compiled.allocations)  # fmt: skip
    number = new.plan.agents[ONE.key]
    after = new.plan.policies[number].egress_port
    await world.enforcement.admit(new.plan)
    assert {(TCP, before), (TCP, after)} <= world.ring.admitted[ONE.address].listeners
    world.compiled = new
    await world.enforcement.set_policies({ONE.key: number})
    assert world.manager.agents()[ONE.cgroup_id].policy == world.known(ONE).policy == number
    assert (TCP, after) in world.ring.admitted[ONE.address].listeners
    assert (TCP, before) not in world.ring.admitted[ONE.address].listeners


async def test_withdrawal_leaves_nothing_of_an_agent(world: World) -> None:
    """Row, names, and what was known of its connections; who keeps something by cgroup is told."""
    forgotten: list[int] = []
    world.enforcement.tell_withdrawn(forgotten.append)
    await world.enroll(ONE)
    world.carries(ONE, "x.com", world.egress)
    await world.enforcement.withdraw(ONE)
    assert ONE.cgroup_id not in world.manager.agents() and forgotten == [ONE.cgroup_id]
    assert world.connections.of(ONE.address) == {}


async def test_a_bypass_that_fails_leaves_nothing_open(world: World) -> None:
    """Neither the ring, when the kernel has no row, nor anything, when the ring opened and did not say so in time."""
    with pytest.raises(Conflict, match="not enrolled"):
        await world.enforcement.open_until(ONE, NEVER, 30)
    assert world.ring.open == {}

    await world.enroll(ONE)
    world.ring.late = True
    with pytest.raises(DeadlineExceeded):
        await world.enforcement.open_until(ONE, NEVER, 30)
    assert world.ring.open == {}
    assert world.manager.agents()[ONE.cgroup_id].bypass_until_ns == world.known(ONE).bypass_until_ns == 0


async def test_a_bypass_is_a_deadline_everywhere_and_ends_everywhere(world: World) -> None:
    """Kernel, roster and ring have it; at its end direct connections that no rule passes are cut, others stay."""
    await world.enroll(ONE)
    await world.enforcement.open_until(ONE, NEVER, 30)
    assert world.manager.agents()[ONE.cgroup_id].bypass_until_ns == world.known(ONE).bypass_until_ns == NEVER
    assert world.ring.open == {ONE.address: 30}
    for destination, port in (("203.0.113.9", 22), ("198.51.100.9", 5432), ("127.0.0.1", 22), (GATEWAY, 7444)):
        world.engine.open(ONE, destination, port)
    assert await world.enforcement.end_bypass(world.known(ONE)) == 1
    assert world.engine.left(ONE) == [("198.51.100.9", 5432), ("127.0.0.1", 22), (GATEWAY, 7444)]
    assert world.manager.agents()[ONE.cgroup_id].bypass_until_ns == world.known(ONE).bypass_until_ns == 0
    assert world.ring.open == {}


async def test_a_change_spares_who_is_bypassed_until_the_bypass_ends(world: World) -> None:
    """Rules that went meanwhile end their connections then: direct ones and those through the proxy alike (I6)."""
    world.compiled = build(rule("https://x.com"), rule("https://y.com"), rule("tcp://z.com:6379"))
    (opaque,) = [one.listen for one in world.compiled.plan.policies[1].opaque]
    await world.enroll(ONE)
    world.carries(ONE, "x.com", world.egress, 40001)
    world.carries(ONE, "y.com", world.egress, 40002)
    world.engine.open(ONE, GATEWAY, opaque, 40003)
    await world.enforcement.open_until(ONE, NEVER, 30)
    new = build(rule("https://x.com"), allocations=world.compiled.allocations)
    assert await world.change(new) == 0 and len(world.engine.left(ONE)) == 3
    assert await world.enforcement.end_bypass(world.known(ONE)) == 2
    assert [one.source_port for one in world.engine.of[ONE.id]] == [40001]


async def test_an_agent_that_is_learnt_is_never_cut(world: World) -> None:
    """Neither by a change nor by the end of a bypass; the ring keeps it open (R38)."""
    learnt = replace(ONE, learn=True)
    await world.enroll(learnt)
    world.engine.open(learnt, "203.0.113.9", 22)
    assert await world.change(build(allocations=world.compiled.allocations)) == 0
    await world.enforcement.open_until(learnt, NEVER, 30)
    assert await world.enforcement.end_bypass(world.known(learnt)) == 0
    assert world.engine.left(learnt) == [("203.0.113.9", 22)] and world.ring.open == {ONE.address: None}


async def test_a_change_cuts_what_it_forbids_and_one_failure_is_one_agents(world: World) -> None:
    """Proxied and direct connections of every agent of the policy; one that cannot be looked at is logged."""
    await world.enroll(ONE, TWO)
    for agent in (ONE, TWO):
        world.carries(agent, "x.com", world.egress)
        world.engine.open(agent, "198.51.100.9", 5432, 40001)
    world.engine.refuse = {ONE.id}
    with capture_logs() as logs:
        assert await world.change(build(rule("https://y.com"), allocations=world.compiled.allocations)) == 2
    assert world.engine.left(TWO) == [] and len(world.engine.left(ONE)) == 2
    assert [(line["event"], line.get("id")) for line in logs] == [
        ("connections_not_cut", ONE.id[:12]), ("connections_cut", None),
    ]  # fmt: skip


async def test_quarantine_leaves_the_gate_and_the_control_plane(world: World) -> None:
    """Everything else is cut and no bypass survives; the ring admits nothing until it is restored (R16)."""
    await world.enroll(ONE)
    await world.enforcement.open_until(ONE, NEVER, 30)
    kept = [(GATEWAY, 53), (GATEWAY, 4444), (GATEWAY, 7080), (GATEWAY, 7444), ("127.0.0.1", 6379)]
    for destination, port in [*kept, (GATEWAY, world.egress), ("198.51.100.9", 5432), (GATEWAY, 9902)]:
        world.engine.open(ONE, destination, port)
    world.engine.open(ONE, "198.51.100.9", 53, protocol=UDP)
    assert await world.enforcement.isolate(world.known(ONE)) == 4
    row = world.manager.agents()[ONE.cgroup_id]
    assert world.engine.left(ONE) == kept
    assert (row.quarantined, row.bypass_until_ns, world.known(ONE).quarantined) == (True, 0, True)
    assert world.ring.open == {} and world.ring.admitted[ONE.address] == Admitted()

    await world.enforcement.restore(world.known(ONE))
    assert not world.manager.agents()[ONE.cgroup_id].quarantined and not world.known(ONE).quarantined
    assert (TCP, world.egress) in world.ring.admitted[ONE.address].listeners


async def test_connections_that_cannot_be_cut_do_not_undo_a_quarantine(world: World) -> None:
    """The rows are closed whether or not the engine answers; the failure is logged."""
    await world.enroll(ONE)
    world.engine.refuse = {ONE.id}
    with capture_logs() as logs:
        assert await world.enforcement.isolate(ONE) == 0
    assert world.manager.agents()[ONE.cgroup_id].quarantined
    assert [line["event"] for line in logs] == ["connections_not_cut"]


async def test_an_adopted_agent_loses_connections_to_listeners_that_are_not_its_own(world: World) -> None:
    """Whoever judged those may have died inside a change; its own listeners and other services are left."""
    await world.enroll(ONE)
    for port in (world.egress, world.egress + 777, 7444, 53, 18374):
        world.engine.open(ONE, GATEWAY, port)
    world.engine.open(ONE, "203.0.113.9", world.egress + 777)
    assert await world.enforcement.cut_strangers(ONE) == 1
    assert (GATEWAY, world.egress + 777) not in world.engine.left(ONE) and len(world.engine.left(ONE)) == 5


async def test_without_a_ring_the_kernel_alone_is_told(world: World) -> None:
    """Every verb works where there is none."""
    world.enforcement = Enforcement(
        world.manager, world.engine, None, world.roster, world.connections, plan=lambda: world.compiled.plan
    )
    await world.enroll(ONE)
    await world.enforcement.open_until(ONE, NEVER, 30)
    await world.enforcement.end_bypass(world.known(ONE))
    await world.enforcement.isolate(world.known(ONE))
    await world.enforcement.restore(world.known(ONE))
    await world.enforcement.admit(world.compiled.plan)
    await world.enforcement.readmit(ONE.address)
    row = world.manager.agents()[ONE.cgroup_id]
    assert (row.quarantined, row.bypass_until_ns) == (False, 0) and world.ring.admitted == {}
