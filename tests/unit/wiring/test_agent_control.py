"""Operators' verbs on one agent: what may be opened, for how long, and what is on disk first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.agents.database import Database
from clawker_cp.agents.directory import by_container
from clawker_cp.agents.quarantines import Quarantines
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.engines.base import Sandbox, SandboxSpec
from clawker_cp.errors import Conflict, InvalidInput
from clawker_cp.wiring.agent_control import NANOSECONDS, AgentControl
from clawker_cp.wiring.enforcement import Living

ID = "a" * 64


class Kernel:
    """Keeps what it was told; a bypass here ends by the test's clock."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.rows = {7}
        self.told: list[str] = []
        self.cut = asyncio.Event()

    async def enroll(self, agent: EnrolledAgent, living: Living) -> None:
        self.rows.add(agent.cgroup_id)
        self.told.append("enroll")

    def enrolled(self, agent: EnrolledAgent) -> bool:
        return agent.cgroup_id in self.rows

    async def open_until(self, agent: EnrolledAgent, until_ns: int, seconds: float) -> None:
        self.roster.update(agent.id, bypass_until_ns=until_ns)
        self.told.append(f"open {seconds}")

    async def end_bypass(self, agent: EnrolledAgent) -> int:
        self.roster.update(agent.id, bypass_until_ns=0)
        self.told.append("end")
        return 2

    async def cut_unruled(self, agent: EnrolledAgent) -> int:
        self.told.append("cut")
        self.cut.set()
        return 1

    async def isolate(self, agent: EnrolledAgent) -> int:
        self.roster.update(agent.id, quarantined=True)
        self.told.append("isolate")
        return 3

    async def restore(self, agent: EnrolledAgent) -> None:
        self.roster.update(agent.id, quarantined=False)
        self.told.append("restore")


class AtOnce:
    """A queue that has nothing else to do."""

    async def perform(self, act: Callable[[], Awaitable[Any]]) -> Any:
        return await act()


class World:
    def __init__(self, directory: Path) -> None:
        self.now_ns = 1000
        self.roster = Roster()
        self.roster.put(EnrolledAgent(ID, "shop", "dev", "198.51.100.7", 7, 1, clock_ns=lambda: self.now_ns))
        spec = SandboxSpec("shop", "dev", ("true",))
        self.running = [Sandbox(ID, spec, "198.51.100.7", "n", "i", directory, 7, directory)]
        self.database = Database(directory / "cp.db")
        self.database.open()
        self.quarantines = Quarantines(self.database)
        self.kernel = Kernel(self.roster)
        self.control = self.make()

    def make(self, **more: Any) -> AgentControl:
        return AgentControl(
            AtOnce(), self.kernel, self.roster, self.quarantines, self.find,
            clock_ns=lambda: self.now_ns, wall=lambda: 5.0, **more,
        )  # fmt: skip

    async def find(self, reference: str) -> Sandbox:
        return by_container(reference, self.running)

    @property
    def agent(self) -> EnrolledAgent:
        agent = self.roster.by_id(ID)
        assert agent is not None
        return agent


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.database.close()


async def test_enabling_writes_a_missing_row_and_ends_a_bypass(world: World) -> None:
    """Both only if needed: enabling again tells the kernel nothing."""
    await world.control.enable(ID[:12])
    assert world.kernel.told == []
    await world.control.bypass(ID, 60)
    world.kernel.rows.clear()
    await world.control.enable("clawker.shop.dev")
    assert world.kernel.told == ["open 60", "enroll", "end"]


@pytest.mark.parametrize("verb", ["enable", "bypass"])
async def test_what_does_not_run_cannot_be_enabled(world: World, verb: str) -> None:
    """An unknown container has the code that the released command line knows."""
    arguments = (60,) if verb == "bypass" else ()
    with pytest.raises(Conflict) as refused:
        await getattr(world.control, verb)("f" * 64, *arguments)
    assert refused.value.code == "CONTAINER_GONE"
    with pytest.raises(InvalidInput):
        await getattr(world.control, verb)("", *arguments)


async def test_a_bypass_is_bounded_and_replaced_by_the_next(world: World) -> None:
    """Zero means the default, too long is refused, and a shorter one shortens."""
    await world.control.bypass(ID, 0)
    assert world.agent.bypass_until_ns == 1000 + 30 * NANOSECONDS
    await world.control.bypass(ID, 2)
    assert world.agent.bypass_until_ns == 1000 + 2 * NANOSECONDS
    with pytest.raises(InvalidInput, match="timeout_seconds: 3601"):
        await world.control.bypass(ID, 3601)


async def test_the_end_of_a_bypass_cuts_what_it_left_behind(world: World) -> None:
    """At the deadline, and not before, connections that no rule covers are destroyed."""
    await world.control.bypass(ID, 1)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(world.control.run())
        async with asyncio.timeout(5):
            world.now_ns += NANOSECONDS + 1
            world.control.follow_bypass(world.agent)
            world.control._changed.set()
            await world.kernel.cut.wait()
        running.cancel()
    assert world.kernel.told == ["open 1", "cut"]


async def test_a_bypass_of_an_earlier_server_is_followed(world: World) -> None:
    """A server that adopts a bypassed agent cuts at its end too."""
    world.roster.update(ID, bypass_until_ns=1000 + NANOSECONDS)
    world.control.follow_bypass(world.agent)
    world.now_ns += NANOSECONDS
    async with asyncio.TaskGroup() as group:
        running = group.create_task(world.control.run())
        async with asyncio.timeout(5):
            await world.kernel.cut.wait()
        running.cancel()


async def test_disable_never_opens_a_running_agent(world: World) -> None:
    """Refused by default, acknowledged without effect when set so, and fine for what is gone."""
    with pytest.raises(Conflict) as refused:
        await world.control.disable(ID)
    assert refused.value.code == "AGENT_RUNNING" and "firewall bypass" in refused.value.message
    await world.make(acknowledge_disable=True).disable(ID)
    await world.control.disable("gone")
    with pytest.raises(InvalidInput):
        await world.control.disable("")
    assert world.kernel.told == []


async def test_a_quarantine_is_on_disk_before_the_kernel(world: World) -> None:
    """If it cannot be written nothing is isolated; if it can, both have it, and a release ends both."""
    world.database.close()
    with pytest.raises(Exception, match="not open"):
        await world.control.quarantine(world.agent, "odd")
    assert world.kernel.told == []
    world.database.open()
    assert await world.control.quarantine(world.agent, "odd") == 3
    assert world.quarantines.all()[ID].reason == world.control.quarantine_reason(ID) == "odd"
    await world.control.release(world.agent)
    assert world.quarantines.all() == {} and world.kernel.told == ["isolate", "restore"]
    await world.control.release(world.agent)
    assert world.kernel.told == ["isolate", "restore"]


async def test_a_quarantined_agent_is_not_bypassed(world: World) -> None:
    """The refusal has its code, and the kernel is not asked to open."""
    await world.control.quarantine(world.agent, "odd")
    with pytest.raises(Conflict) as refused:
        await world.control.bypass(ID, 5)
    assert refused.value.code == "AGENT_QUARANTINED" and world.kernel.told == ["isolate"]
