"""
Containers are denied, then enrolled, and let go only when dead; whatever order their events come in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.agents.container_lives import ContainerLives
from clawker_cp.agents.database import Database
from clawker_cp.agents.quarantines import EXPOSURE, OPERATOR, Quarantines
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.errors import Conflict, NotFound, Unavailable

ID, OTHER = "a" * 64, "b" * 64


@dataclass(frozen=True)
class Container:
    id: str = ID
    project: str = "shop"
    agent: str = "dev"
    is_agent: bool = True
    running: bool = True
    address: str = "198.51.100.7"
    cgroup_path: Path | None = Path("/cg/a")
    exposures: tuple[str, ...] = ()


class Engine:
    """The engine's record, changed by the test."""

    def __init__(self) -> None:
        self.containers: dict[str, Container] = {}
        self.down = False

    def put(self, container: Container) -> Container:
        self.containers[container.id] = container
        return container

    async def inspect(self, reference: str) -> Container:
        if self.down:
            raise Unavailable("the engine does not answer")
        if reference not in self.containers:
            raise NotFound(f"container {reference} is not known")
        return self.containers[reference]

    async def living(self) -> list[Container]:
        if self.down:
            raise Unavailable("the engine does not answer")
        return [one for one in self.containers.values() if one.running and one.is_agent]


class Kernel:
    """Cgroups by path, programs and rows; a journal of what was told in which order."""

    def __init__(self) -> None:
        self.ids: dict[Path, int] = {Path("/cg/a"): 7, Path("/cg/b"): 8}
        self.attached: set[int] = set()
        self.rows: dict[int, EnrolledAgent] = {}
        self.alive: set[int] = set()
        self.opened: set[str] = set()
        self.died = asyncio.Event()
        self.told: list[str] = []
        self.refuse = False

    async def attach(self, container: Container) -> int:
        assert container.cgroup_path is not None
        cgroup_id = self.ids[container.cgroup_path]
        self.attached.add(cgroup_id)
        self.told.append(f"attach {cgroup_id}")
        return cgroup_id

    async def admit(self, agent: EnrolledAgent, container: Container) -> None:
        assert agent.cgroup_id in self.attached
        if self.refuse:
            raise Unavailable("the map is full")
        self.rows[agent.cgroup_id] = agent
        self.told.append(f"admit {agent.cgroup_id}")

    async def open(self, container: Container) -> None:
        assert container.cgroup_path is not None and self.ids[container.cgroup_path] in self.rows
        self.opened.add(container.id)

    async def holds(self, agent: EnrolledAgent, container: Container) -> bool:
        return agent.cgroup_id in self.rows and container.id in self.opened

    async def isolate(self, agent: EnrolledAgent) -> None:
        self.told.append(f"isolate {agent.cgroup_id}")

    async def wait_dead(self, cgroup_id: int) -> None:
        while cgroup_id in self.alive:
            await self.died.wait()

    async def withdraw(self, agent: EnrolledAgent) -> None:
        self.rows.pop(agent.cgroup_id, None)
        self.attached.discard(agent.cgroup_id)
        self.opened.discard(agent.id)
        self.told.append(f"withdraw {agent.cgroup_id}")


class Policy:
    """Gives every agent the number of its length; knows who is known."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    async def put_ephemeral(self, key: str, rules: str, *, learn: bool = False) -> int:
        self.known.add(key)
        return 3

    def policy_of(self, key: str) -> int:
        return 3 if key in self.known else 1

    async def perform(self, act: Callable[[], Awaitable[object]]) -> object:
        return await act()

    async def drop_ephemeral(self, key: str) -> None:
        self.known.discard(key)


class World:
    def __init__(self, directory: Path, *, quarantine_exposed: bool = False) -> None:
        self.engine, self.kernel, self.policy, self.roster = Engine(), Kernel(), Policy(), Roster()
        self.database = Database(directory / "cp.db")
        self.database.open()
        self.quarantines = Quarantines(self.database)
        self.on = True
        self.settled: list[str] = []
        self.lives = ContainerLives(
            self.engine, self.policy, self.kernel, self.roster, self.quarantines,
            up=lambda: self.on, quarantine_exposed=quarantine_exposed, settle=self._settle, wall=lambda: 5.0,
        )  # fmt: skip

    async def _settle(self, container_id: str) -> None:
        assert self.roster.by_id(container_id) is not None
        self.settled.append(container_id)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.database.close()


async def test_programs_come_before_the_row(world: World) -> None:
    """A container is denied before anything else is known of it, and enrolled once whatever is repeated (I4)."""
    world.engine.put(Container())
    await world.lives.refresh(ID)
    await world.lives.refresh(ID)

    agent = world.roster.by_id(ID)
    assert [word for word in world.kernel.told if word != "attach 7"] == ["admit 7"]
    assert world.kernel.told[0] == "attach 7"
    assert agent is not None and (agent.key, agent.policy, agent.address) == ("agent:shop/dev", 3, "198.51.100.7")
    assert [one.id for one in world.lives.living()] == [ID]


async def test_rows_go_only_after_the_last_process(world: World) -> None:
    """A death event withdraws nothing while a process is left in the cgroup (I4)."""
    world.engine.put(Container())
    await world.lives.refresh(ID)
    world.kernel.alive = {7}
    world.engine.put(Container(running=False))
    async with asyncio.TaskGroup() as group:
        ending = group.create_task(world.lives.refresh(ID))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 7 in world.kernel.rows and world.roster.by_id(ID) is not None
        world.kernel.alive.clear()
        world.kernel.died.set()
        await ending

    assert world.kernel.rows == {} and world.roster.by_id(ID) is None and world.policy.known == set()
    assert world.settled == [ID]


async def test_a_restart_is_a_new_cgroup(world: World) -> None:
    """Started again in another cgroup: the former one's rows go, the new one is denied until its own row is there."""
    world.engine.put(Container())
    await world.lives.refresh(ID)
    world.kernel.ids[Path("/cg/a")] = 9
    await world.lives.refresh(ID)

    assert world.kernel.told == ["attach 7", "admit 7", "attach 9", "withdraw 7", "admit 9"]
    assert set(world.kernel.rows) == {9}


async def test_rules_of_two_containers_with_one_name_stay_for_the_second(world: World) -> None:
    """The policy is forgotten with the last container of that name."""
    world.engine.put(Container())
    world.engine.put(Container(id=OTHER, cgroup_path=Path("/cg/b"), address="198.51.100.8"))
    await world.lives.reconcile()
    del world.engine.containers[ID]
    await world.lives.refresh(ID)
    assert world.policy.known == {"agent:shop/dev"}
    del world.engine.containers[OTHER]
    await world.lives.refresh(OTHER)
    assert world.policy.known == set()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"agent": ""}, "label dev.clawker.agent"),
        ({"agent": "a b"}, "label dev.clawker.agent"),
        ({"project": "x" * 70_000}, "label dev.clawker.project"),
        ({"address": ""}, "no address"),
    ],
)
async def test_what_cannot_be_known_stays_denied(world: World, wrong: dict[str, Any], why: str) -> None:
    """Unusable labels and a missing address are told; programs without a row judge the container meanwhile."""
    world.engine.put(replace(Container(), **wrong))
    await world.lives.attempt(ID)

    assert world.kernel.attached == {7} and world.kernel.rows == {}
    assert why in world.lives.failures()[ID]


async def test_a_kernel_that_refuses_leaves_nobody_in_the_roster(world: World) -> None:
    """Who has no row is nobody's agent, and the next look tries again."""
    world.engine.put(Container())
    world.kernel.refuse = True
    await world.lives.attempt(ID)
    assert world.roster.by_id(ID) is None and world.lives.failures()
    world.kernel.refuse = False
    await world.lives.reconcile()
    assert world.roster.by_id(ID) is not None and world.lives.failures() == {}


async def test_an_engine_that_does_not_answer_changes_nothing(world: World) -> None:
    """Not knowing is not a death: rows stay as they are."""
    world.engine.put(Container())
    await world.lives.refresh(ID)
    world.engine.down = True
    await world.lives.attempt(ID)
    with pytest.raises(Unavailable):
        await world.lives.reconcile()
    assert set(world.kernel.rows) == {7}


async def test_nothing_is_enrolled_while_the_firewall_is_off(world: World) -> None:
    """Agents started then are unmanaged until it is turned on again, when everything that runs is enrolled."""
    world.engine.put(Container())
    world.on = False
    await world.lives.refresh(ID)
    assert world.kernel.told == []
    world.on = True
    await world.lives.reconcile()
    assert set(world.kernel.rows) == {7}


async def test_ensure_finds_only_running_agents(world: World) -> None:
    """What is gone, stopped or no agent is CONTAINER_GONE; what runs is enrolled when the answer comes."""
    with pytest.raises(Conflict) as gone:
        await world.lives.ensure(ID)
    assert gone.value.code == "CONTAINER_GONE"
    world.engine.put(Container(is_agent=False))
    with pytest.raises(Conflict):
        await world.lives.ensure(ID)
    world.engine.put(Container())
    assert (await world.lives.ensure(ID)).id == ID
    assert 7 in world.kernel.rows


async def test_exposures_are_told_and_quarantine_where_asked(tmp_path: Path) -> None:
    """A way out given by the owner takes the network away until an operator accepts exactly that (R34, R16)."""
    world = World(tmp_path, quarantine_exposed=True)
    exposed = world.engine.put(Container(exposures=("privileged",)))
    await world.lives.refresh(ID)
    agent = world.roster.by_id(ID)
    row = world.quarantines.get(ID)
    assert agent is not None and agent.quarantined and row is not None and row.cause == EXPOSURE
    world.quarantines.release(ID, exposed.exposures)
    world.kernel.ids[Path("/cg/a")] = 9
    await world.lives.refresh(ID)
    agent = world.roster.by_id(ID)
    assert agent is not None and not agent.quarantined
    world.database.close()


async def test_a_quarantine_outlives_a_stop_and_not_the_container(world: World) -> None:
    """Stopped and started again it is still quarantined; destroyed, its id means nothing any more."""
    world.quarantines.put(ID, OPERATOR, "because", 1)
    world.engine.put(Container())
    await world.lives.refresh(ID)
    agent = world.roster.by_id(ID)
    assert agent is not None and agent.quarantined
    del world.engine.containers[ID]
    await world.lives.destroyed(ID)
    assert world.quarantines.get(ID) is None and world.kernel.rows == {}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["start", "stop", "remove", "look", "reconcile", "restart"]), st.booleans()),
        max_size=14,
    )
)
def test_any_order_ends_in_what_the_engine_says(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bool]]
) -> None:
    """Whatever events come, late or lost, after one reconcile exactly the running agents have rows."""

    async def play() -> None:
        world = World(tmp_path_factory.mktemp("lives"))
        number = 10
        for step, second in steps:
            container_id = OTHER if second else ID
            path = Path("/cg/b" if second else "/cg/a")
            container = Container(id=container_id, cgroup_path=path, agent="b" if second else "a")
            if step in {"start", "restart"}:
                number += 1
                world.kernel.ids[path] = number
                world.engine.put(container)
            elif step == "stop" and container_id in world.engine.containers:
                world.engine.put(replace(container, running=False))
            elif step == "remove":
                world.engine.containers.pop(container_id, None)
            elif step == "look":
                await world.lives.attempt(container_id)
            elif step == "reconcile":
                await world.lives.reconcile()
        await world.lives.reconcile()
        running = {one.id: one for one in world.engine.containers.values() if one.running}
        assert {agent.id for agent in world.roster} == set(running)
        assert {agent.id for agent in world.kernel.rows.values()} == set(running)
        assert world.kernel.attached == set(world.kernel.rows)
        assert world.policy.known == {f"agent:shop/{one.agent}" for one in running.values()}
        world.database.close()

    asyncio.run(play())


async def test_a_quarantine_between_judging_and_enrolling_holds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is enrolled again, as after a change of networks, is what an operator said last."""
    world.engine.put(Container())
    await world.lives.refresh(ID)
    put = world.policy.put_ephemeral

    async def meanwhile(key: str, rules: str, *, learn: bool = False) -> int:
        world.quarantines.put(ID, OPERATOR, "now", 1)
        return await put(key, rules, learn=learn)

    monkeypatch.setattr(world.policy, "put_ephemeral", meanwhile)
    world.engine.put(Container(address="198.51.100.8"))
    await world.lives.refresh(ID)

    known = world.roster.by_id(ID)
    assert known is not None and (known.address, known.quarantined) == ("198.51.100.8", True)
    assert world.kernel.rows[7].quarantined


async def test_a_way_out_given_later_quarantines_then(tmp_path: Path) -> None:
    """An exposure of an agent that runs is judged like one from the start, once, and isolates it (row 34)."""
    world = World(tmp_path, quarantine_exposed=True)
    world.engine.put(Container())
    await world.lives.refresh(ID)
    world.engine.put(Container(exposures=("second_network:aside",)))
    await world.lives.refresh(ID)
    reason = world.quarantines.get(ID)
    world.database.close()

    assert reason is not None and reason.cause == EXPOSURE
    assert world.kernel.told == ["attach 7", "admit 7", "attach 7", "isolate 7"]


async def test_an_isolation_that_failed_half_way_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roster knows of it before the ring does: that alone does not count as done."""
    world = World(tmp_path, quarantine_exposed=True)
    world.engine.put(Container())
    await world.lives.refresh(ID)

    async def half(agent: EnrolledAgent) -> None:
        world.roster.update(agent.id, quarantined=True)
        raise Unavailable("nft did not end")

    with monkeypatch.context() as failing:
        failing.setattr(world.kernel, "isolate", half)
        world.engine.put(Container(exposures=("second_network:aside",)))
        await world.lives.attempt(ID)
    failures = world.lives.failures()
    await world.lives.retry()
    await world.lives.refresh(ID)
    world.database.close()

    assert failures == {ID: "nft did not end"} and world.lives.failures() == {}
    assert world.kernel.told.count("isolate 7") == 1


async def test_who_is_refused_is_shown_and_tried_again(tmp_path: Path) -> None:
    """A full table leaves the agent denied and listed with the cause; the next try enrols it."""
    world = World(tmp_path)
    world.engine.put(Container(exposures=("host_network",)))
    world.kernel.refuse = True
    await world.lives.attempt(ID)
    denied = [(one.id, one.exposures) for one in world.lives.denied()]
    failures = world.lives.failures()
    world.kernel.refuse = False
    await world.lives.retry()
    world.database.close()

    assert denied == [(ID, ("host_network",))] and failures == {ID: "the map is full"}
    assert world.lives.denied() == [] and world.lives.failures() == {}
    assert world.roster.by_id(ID) is not None
