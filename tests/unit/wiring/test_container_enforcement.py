"""Programs, row and frames of a container: in which order, and what is left when one of them is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.agents.roster import EnrolledAgent
from clawker_cp.engines.base import AgentContainer
from clawker_cp.errors import Conflict, NotFound, Unavailable
from clawker_cp.testing.clock import FakeClock
from clawker_cp.wiring.container_enforcement import ContainerEnforcement

ID = "a" * 64


@dataclass(frozen=True)
class Port:
    interface: str
    index: int
    mac: str


class Host:
    """Manager, enforcement and ring in one, with a journal."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.rows: set[int] = set()
        self.linked: set[int] = set()
        self.ports: dict[int, Port] = {100: Port("veth1", 5, "02:00:00:00:00:01")}
        self.busy = False

    def attach(self, cgroup: Path) -> int:
        number = cgroup.stat().st_ino
        self.linked.add(number)
        return number

    def detach(self, cgroup_id: int) -> None:
        if self.busy:
            raise Conflict("still has processes")
        self.linked.discard(cgroup_id)

    def attached(self) -> set[int]:
        return set(self.linked)

    async def enroll(self, agent: EnrolledAgent, living: Any) -> None:
        self.rows.add(agent.cgroup_id)
        self.told.append("row")

    def enrolled(self, agent: EnrolledAgent) -> bool:
        return agent.cgroup_id in self.rows

    async def withdraw(self, agent: EnrolledAgent) -> None:
        self.rows.discard(agent.cgroup_id)
        self.told.append("no row")

    async def isolate(self, agent: EnrolledAgent) -> int:
        self.told.append("isolate")
        return 0

    async def cut_strangers(self, agent: EnrolledAgent) -> int:
        self.told.append("cut strangers")
        return 0

    async def readmit(self, address: str) -> None:
        if any(word.startswith("pin") for word in self.told):
            self.told.append(f"readmit {address}")

    async def pin(self, interface: str, address: str, *, mac: str, infrastructure: bool = False) -> None:
        self.told.append(f"pin {interface} {address} {mac[-2:]}{' infrastructure' if infrastructure else ''}")

    async def unpin(self, interface: str, address: str) -> None:
        self.told.append(f"unpin {interface} {address}")

    async def find_port(self, pid: int) -> Port:
        if pid not in self.ports:
            raise NotFound(f"process {pid} is gone")
        return self.ports[pid]


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    made = tmp_path / "cgroup"
    made.mkdir()
    (made / "cgroup.events").write_text("populated 0\n")
    return made


@pytest.fixture
def container(cgroup: Path) -> AgentContainer:
    return AgentContainer(ID, "c", {}, True, address="198.51.100.7", pid=100, cgroup_path=cgroup)


def make(host: Host, *, ring: bool = True, clock: FakeClock | None = None) -> ContainerEnforcement:
    return ContainerEnforcement(host, host, host if ring else None, host.find_port, clock or FakeClock())


def agent_in(cgroup: Path) -> EnrolledAgent:
    return EnrolledAgent(ID, "p", "a", "198.51.100.7", cgroup.stat().st_ino, 1)


async def test_frames_pass_last_and_stop_first(container: AgentContainer, cgroup: Path) -> None:
    """The row is there before a frame passes, and still there when the last one did."""
    host = Host()
    side = make(host)
    agent = agent_in(cgroup)
    assert await side.attach(container) == agent.cgroup_id
    await side.admit(agent, container)
    await side.open(container)
    assert await side.holds(agent, container) and side.owner(5) == ID
    await side.withdraw(agent)
    assert host.told == [
        "row",
        "pin veth1 198.51.100.7 01",
        "readmit 198.51.100.7",
        "unpin veth1 198.51.100.7",
        "no row",
    ]
    assert side.owner(5) == "" and not await side.holds(agent, container)


async def test_another_process_or_address_is_another_port(container: AgentContainer, cgroup: Path) -> None:
    """What holds is exactly this process at this address; a new port takes the former one back first."""
    host = Host()
    side = make(host)
    agent = agent_in(cgroup)
    await side.attach(container)
    await side.admit(agent, container)
    await side.open(container)
    again = AgentContainer(ID, "c", {}, True, address="198.51.100.8", pid=200, cgroup_path=cgroup)
    host.ports[200] = Port("veth2", 6, "02:00:00:00:00:02")
    assert not await side.holds(agent, again)
    await side.open(again)
    assert host.told[-3:] == ["unpin veth1 198.51.100.7", "pin veth2 198.51.100.8 02", "readmit 198.51.100.8"]


async def test_a_container_without_a_cgroup_is_told(container: AgentContainer) -> None:
    """Nobody can be judged whose cgroup is not known, and the message says what to look at."""
    with pytest.raises(Unavailable, match="cgroup of container aaaaaaaaaaaa"):
        await make(Host()).attach(AgentContainer(ID, "c", {}, True, pid=100))


async def test_a_port_that_is_gone_leaves_the_container_closed(container: AgentContainer, cgroup: Path) -> None:
    """The row alone opens nothing: no frame passes, and the next look tries again."""
    host = Host()
    host.ports.clear()
    side = make(host)
    agent = agent_in(cgroup)
    await side.attach(container)
    await side.admit(agent, container)
    with pytest.raises(NotFound):
        await side.open(container)
    assert not await side.holds(agent, container)
    assert [word for word in host.told if word.startswith("pin")] == []


async def test_a_neighbour_is_no_agent_to_the_ring(container: AgentContainer) -> None:
    """Its frames pass as those of infrastructure, and stop when it is gone."""
    host = Host()
    side = make(host)
    await side.admit_neighbour(container)
    await side.forget_neighbour(ID)
    await side.forget_neighbour(ID)
    assert host.told == ["pin veth1 198.51.100.7 01 infrastructure", "unpin veth1 198.51.100.7"]


async def test_without_a_ring_the_row_is_enough(container: AgentContainer, cgroup: Path) -> None:
    """`firewall.host_ring: false` asks nothing of the host's packet filter."""
    host = Host()
    side = make(host, ring=False)
    agent = agent_in(cgroup)
    await side.attach(container)
    await side.admit(agent, container)
    await side.open(container)
    assert host.told == ["row"] and await side.holds(agent, container)


async def test_what_was_pinned_before_is_remembered(container: AgentContainer) -> None:
    """An adopted container's port is known again; one whose process is gone is left out."""
    host = Host()
    side = make(host)
    gone = AgentContainer("b" * 64, "d", {}, True, address="198.51.100.9", pid=300)
    found = await side.took_over([container, gone])
    assert [(one.id, port.interface) for one, port in found] == [(ID, "veth1")]


async def test_a_cgroup_that_nobody_enrolled_is_let_go(container: AgentContainer, cgroup: Path) -> None:
    """Linked early for a container that never became an agent: swept once it is empty, never while it lives."""
    host = Host()
    side = make(host)
    number = await side.attach(container)
    (cgroup / "cgroup.events").write_text("populated 1\n")
    await side.sweep(set())
    assert host.linked == {number}
    (cgroup / "cgroup.events").write_text("populated 0\n")
    await side.sweep({number})
    assert host.linked == {number}
    host.busy = True
    await side.sweep(set())
    assert host.linked == {number}
    host.busy = False
    await side.sweep(set())
    assert host.linked == set()


async def test_death_is_the_end_of_the_last_process(container: AgentContainer, cgroup: Path) -> None:
    """Waiting ends when the cgroup is empty, gone, or another one of the same path."""
    asked: list[Callable[[], None]] = []

    class Clock(FakeClock):
        async def sleep(self, seconds: float) -> None:
            asked.pop()()

    host = Host()
    side = make(host, clock=Clock())
    number = await side.attach(container)
    events = cgroup / "cgroup.events"
    events.write_text("populated 1\n")
    asked.append(lambda: None if events.write_text("populated 0\n") else None)
    await side.wait_dead(number)
    assert asked == []
    await side.wait_dead(number + 1)  # never attached: nothing to wait for


async def test_a_shared_port_is_an_agents_until_the_last_agent_is_gone(container: AgentContainer, cgroup: Path) -> None:
    """Behind one port a neighbour does not take an agent's pin, and one that leaves does not close it for the other."""
    host = Host()
    side = make(host)
    neighbour = AgentContainer("b" * 64, "n", {}, True, address=container.address, pid=100)
    await side.admit_neighbour(neighbour)
    await side.attach(container)
    await side.open(container)
    await side.admit_neighbour(neighbour)  # an event of it, whichever
    await side.withdraw(agent_in(cgroup))
    await side.forget_neighbour(neighbour.id)
    pins = [word for word in host.told if "pin" in word]
    assert pins == [
        "pin veth1 198.51.100.7 01 infrastructure", "pin veth1 198.51.100.7 01",
        "pin veth1 198.51.100.7 01 infrastructure", "unpin veth1 198.51.100.7",
    ]  # fmt: skip


async def test_a_port_in_doubt_is_looked_up_again(container: AgentContainer, cgroup: Path) -> None:
    """Off the network and on again is another veth at the same address and process: it holds only once it is pinned."""
    host = Host()
    side = make(host)
    agent = agent_in(cgroup)
    await side.attach(container)
    await side.admit(agent, container)
    await side.open(container)
    host.ports[100] = Port("veth9", 9, "02:00:00:00:00:09")
    side.doubt(ID)
    held = await side.holds(agent, container)
    await side.open(container)
    assert not held and await side.holds(agent, container)
    assert host.told[-3:-1] == ["unpin veth1 198.51.100.7", "pin veth9 198.51.100.7 09"]
