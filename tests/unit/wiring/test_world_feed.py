"""The engine's events become the world, whatever order they come in and whatever is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from clawker_cp.agents.world_messages import (
    ContainerDestroyed,
    ContainerDied,
    ContainerDisconnected,
    ContainerEntry,
    ContainerPaused,
    ContainerRenamed,
)
from clawker_cp.agents.worldview import Worldview
from clawker_cp.engines.base import AgentContainer
from clawker_cp.engines.dockerevents import DockerEvent
from clawker_cp.errors import NotFound, Unavailable
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.testing.clock import FakeClock
from clawker_cp.wiring.world_feed import Told, WorldFeed, concerns, entry_of, told

NETWORK = "n" * 64
LABELS = {
    "dev.clawker.managed": "true",
    "dev.clawker.purpose": "agent",
    "dev.clawker.project": "shop",
    "dev.clawker.agent": "dev",
}
A = AgentContainer("a", "one", LABELS, running=True, address="198.51.100.7")


class Engine:
    """What exists, and how often it was asked."""

    def __init__(self, *containers: AgentContainer) -> None:
        self.clock = FakeClock()
        self.overseer = Overseer(self.clock)
        self.view = Worldview()
        self.overseer.attach(self.view)
        self.containers = {one.id: one for one in containers}
        self.asked: list[str] = []
        self.lists = 0
        self.down = False
        self.held: asyncio.Event | None = None
        self.feed = WorldFeed(self.overseer, self.inspect, self.existing, NETWORK, self.clock)

    async def inspect(self, container_id: str) -> AgentContainer:
        self.asked.append(container_id)
        if self.held is not None:
            await self.held.wait()
        if self.down:
            raise Unavailable("the engine is down")
        if container_id not in self.containers:
            raise NotFound(container_id)
        return self.containers[container_id]

    async def existing(self) -> list[str]:
        self.lists += 1
        return [*self.containers, "gone meanwhile"]

    async def tell(self, kind: str, action: str, subject: str, container: str = "", name: str = "") -> None:
        await self.clock.advance(1)
        attributes = {"container": container} if container else {}
        self.overseer.publish(DockerEvent(kind, action, subject, name, attributes, self.clock.wall_ns(), b"{}"))
        await settled()

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[asyncio.Task[None]]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.feed.run())
            await settled()
            self.asked.clear()
            try:
                yield task
            finally:
                task.cancel()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (DockerEvent("container", "die", "a", time_ns=5), ContainerDied("a", 5)),
        (DockerEvent("container", "destroy", "a", time_ns=5), ContainerDestroyed("a", 5)),
        (DockerEvent("container", "rename", "a", "/two", time_ns=5), ContainerRenamed("a", 5, name="two")),
        (DockerEvent("container", "pause", "a", time_ns=5), ContainerPaused("a", 5, paused=True)),
        (DockerEvent("container", "unpause", "a", time_ns=5), ContainerPaused("a", 5, paused=False)),
        (
            DockerEvent("network", "disconnect", NETWORK, attributes={"container": "a"}, time_ns=5),
            ContainerDisconnected("a", 5),
        ),
        (DockerEvent("container", "create", "a"), None),
        (DockerEvent("container", "start", "a"), None),
        (DockerEvent("container", "restart", "a"), None),
        (DockerEvent("container", "rename", "a"), None),
        (DockerEvent("network", "connect", NETWORK, attributes={"container": "a"}), None),
    ],
)
def test_what_events_say(event: DockerEvent, message: Told | None) -> None:
    """By themselves, or that the engine has to be asked."""
    assert concerns(event, NETWORK)
    assert told(event) == message


@pytest.mark.parametrize(
    "event",
    [
        DockerEvent("container", "exec_start: sh", "a"),
        DockerEvent("container", "kill", "a"),
        DockerEvent("network", "connect", "m" * 64, attributes={"container": "a"}),
        DockerEvent("network", "connect", NETWORK),
        DockerEvent("network", "create", NETWORK, attributes={"container": "a"}),
        DockerEvent("image", "pull", "a"),
    ],
)
def test_what_does_not_concern_us(event: DockerEvent) -> None:
    """Other actions, other networks, nobody's events."""
    assert not concerns(event, NETWORK)


def test_a_record_becomes_an_entry() -> None:
    """Identity from the labels; what does not run has no address."""
    entry = ContainerEntry("a", "one", "shop", "dev", is_agent=True, running=True, address="198.51.100.7")
    assert entry_of(A) == entry
    stopped = entry_of(replace(A, running=False, paused=True))
    assert (stopped.running, stopped.paused, stopped.address) == (False, False, "")
    assert not entry_of(replace(A, labels={})).is_agent


async def test_the_world_begins_with_a_list_and_follows() -> None:
    """What was there, what starts, moves, is renamed, paused, dies and goes."""
    engine = Engine(A)
    view = engine.view

    def known(container: str) -> ContainerEntry:
        found = view.container(container)
        assert found is not None
        return found

    async with engine.followed():
        assert dict(view.snapshot().containers) == {"a": entry_of(A)}
        b = replace(A, id="b", address="198.51.100.8")
        engine.containers["b"] = b
        await engine.tell("container", "start", "b")
        assert view.container("b") == entry_of(b)
        engine.containers["b"] = replace(b, address="198.51.100.9")
        await engine.tell("network", "disconnect", NETWORK, "b")
        assert known("b").address == ""
        await engine.tell("network", "connect", NETWORK, "b")
        assert known("b").address == "198.51.100.9"
        await engine.tell("container", "pause", "b")
        await engine.tell("container", "rename", "b", name="two")
        assert (known("b").paused, known("b").name, engine.asked) == (True, "two", ["b", "b"])
        await engine.tell("container", "exec_start: sh", "b")
        await engine.tell("container", "die", "b")
        assert (known("a").running, known("b").running) == (True, False)
        await engine.tell("container", "destroy", "b")
        assert list(view.snapshot().containers) == ["a"]
    assert engine.lists == 1


async def test_what_happens_while_it_lists_is_not_undone() -> None:
    """A container that dies while the list is being made is dead afterwards, not as it was listed."""
    engine = Engine(A)
    engine.held = asyncio.Event()
    async with engine.followed():
        await engine.tell("container", "die", "a")
        engine.held.set()
        await settled()
        found = engine.view.container("a")

    assert found is not None
    assert not found.running


async def test_a_container_that_is_gone_when_it_is_asked_for_is_gone() -> None:
    """Started and removed before the engine answers."""
    engine = Engine(A)
    async with engine.followed():
        del engine.containers["a"]
        await engine.tell("container", "start", "a")

        assert engine.view.container("a") is None


async def test_after_a_loss_the_engine_is_listed() -> None:
    """Events that had no room left are made good by what exists."""
    engine = Engine(A)
    async with engine.followed():
        engine.held = asyncio.Event()
        await engine.tell("container", "start", "a")
        for _ in range(5000):
            engine.overseer.publish(DockerEvent("container", "pause", "a"))
        engine.containers = {"b": replace(A, id="b")}
        await engine.clock.advance(1)
        engine.held.set()
        async with asyncio.timeout(20):
            while engine.overseer.statistics().subscribers[0].waiting:
                await asyncio.sleep(0)

        assert engine.lists == 2
        assert list(engine.view.snapshot().containers) == ["b"]


async def test_an_engine_that_cannot_say_ends_it_and_the_next_run_puts_it_right() -> None:
    """The failure is raised to whoever starts parts again; the world stays as it was until then."""
    engine = Engine(A)
    with pytest.raises(ExceptionGroup) as raised:
        async with engine.followed():
            engine.down = True
            await engine.tell("container", "start", "b")
    assert [type(error) for error in raised.value.exceptions] == [Unavailable]
    assert list(engine.view.snapshot().containers) == ["a"]
    engine.down = False
    engine.containers = {"b": replace(A, id="b")}
    await engine.clock.advance(1)
    async with engine.followed() as task:
        assert list(engine.view.snapshot().containers) == ["b"]
        await engine.overseer.aclose()
        assert task.done()


@pytest.mark.parametrize("when", ["listing", "waiting", "asking"])
async def test_cancelled_anywhere_it_leaves_the_bus(when: str) -> None:
    """While it lists, waits or asks: its subscription is gone, and the world is as it was told."""
    engine = Engine(A)
    if when == "listing":
        engine.held = asyncio.Event()
    async with engine.followed() as task:
        if when == "asking":
            engine.held = asyncio.Event()
            await engine.tell("container", "start", "a")

    assert task.cancelled()
    assert engine.overseer.statistics().subscribers == ()
    assert list(engine.view.snapshot().containers) == ([] if when == "listing" else ["a"])
