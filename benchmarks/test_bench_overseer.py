"""
Messages through the bus to 1, 8 and 64 subscribers, against an `asyncio.Queue` each in the same run.

A round publishes 256 messages in bursts of 32 and ends when every subscriber has handled all. A queue has
neither types nor loss counts, ages and containment; the ratio is what those cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from clawker_cp.agents.world_messages import ContainerEntry, ContainerPaused, ContainerSeen
from clawker_cp.agents.worldview import Worldview
from clawker_cp.runtime.overseer import Overseer

COUNT, BURST = 256, 32


class Message(msgspec.Struct, frozen=True, gc=False):
    """What is sent."""

    number: int


MESSAGES = [Message(number) for number in range(COUNT)]


class Arrivals:
    """Counts what was handled, and wakes the publisher when a burst has arrived everywhere."""

    def __init__(self, subscribers: int) -> None:
        self._subscribers = subscribers
        self._left = 0
        self.done = asyncio.Event()

    def expect(self) -> None:
        self._left = BURST * self._subscribers
        self.done.clear()

    def arrived(self) -> None:
        self._left -= 1
        if not self._left:
            self.done.set()


async def by_bus_iterated(group: asyncio.TaskGroup, count: int, arrivals: Arrivals) -> Callable[[Message], None]:
    """`subscription` and `async for`."""
    overseer = Overseer()

    async def read() -> None:
        async with overseer.subscription(Message, name="bench") as items:
            async for _item in items:
                arrivals.arrived()

    for _ in range(count):
        group.create_task(read())
    return overseer.publish


async def by_bus_followed(group: asyncio.TaskGroup, count: int, arrivals: Arrivals) -> Callable[[Message], None]:
    """`follow` with a handler."""
    overseer = Overseer()

    async def handle(_message: Message) -> None:
        arrivals.arrived()

    for _ in range(count):
        group.create_task(overseer.follow(Message, handler=handle, name="bench"))
    return overseer.publish


async def by_queues(group: asyncio.TaskGroup, count: int, arrivals: Arrivals) -> Callable[[Message], None]:
    """One `asyncio.Queue` for each reader."""
    queues: list[asyncio.Queue[Message]] = [asyncio.Queue(4096) for _ in range(count)]

    async def read(queue: asyncio.Queue[Message]) -> None:
        while True:
            await queue.get()
            arrivals.arrived()

    def publish(message: Message) -> None:
        for queue in queues:
            queue.put_nowait(message)

    for queue in queues:
        group.create_task(read(queue))
    return publish


@contextmanager
def rounds(fan: Any, subscribers: int) -> Iterator[Callable[[], None]]:
    """A loop with subscribers on it, and what one round does."""
    with asyncio.Runner() as runner:
        ready: list[Any] = []

        async def serve() -> None:
            async with asyncio.TaskGroup() as group:
                arrivals = Arrivals(subscribers)
                ready.append((await fan(group, subscribers, arrivals), arrivals))
                await asyncio.Event().wait()

        loop = runner.get_loop()
        serving = loop.create_task(serve())

        async def begun() -> None:
            for _ in range(4):
                await asyncio.sleep(0)

        runner.run(begun())
        publish, arrivals = ready[0]

        async def one() -> None:
            for start in range(0, COUNT, BURST):
                arrivals.expect()
                for message in MESSAGES[start : start + BURST]:
                    publish(message)
                await arrivals.done.wait()

        async def end() -> None:
            serving.cancel()
            await asyncio.wait([serving])

        try:
            yield lambda: runner.run(one())
        finally:
            runner.run(end())


@pytest.mark.benchmark(group="256 messages to each subscriber")
@pytest.mark.parametrize("fan", [by_bus_iterated, by_bus_followed, by_queues], ids=["iterated", "followed", "queues"])
@pytest.mark.parametrize("subscribers", [1, 8, 64])
def test_bench_fan_out(benchmark: Any, fan: Any, subscribers: int) -> None:
    """Published, waited for, handled by everybody."""
    benchmark.group = f"256 messages to {subscribers} subscribers"
    with rounds(fan, subscribers) as one:
        benchmark(one)
    if benchmark.stats is not None:
        benchmark.extra_info["messages/s"] = round(COUNT / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="publish 256 messages nobody hears")
def test_bench_unheard(benchmark: Any) -> None:
    """What telling costs where nobody listens."""
    overseer = Overseer()

    def tell() -> None:
        for message in MESSAGES:
            overseer.publish(message)

    benchmark(tell)

    assert overseer.statistics().unheard == overseer.statistics().published > 0


@pytest.mark.benchmark(group="256 changes among 4096 containers")
def test_bench_worldview(benchmark: Any) -> None:
    """Messages folded into a full worldview."""
    overseer, view = Overseer(), Worldview()
    overseer.attach(view)
    ids = [f"{number:064x}" for number in range(4096)]
    for number, one in enumerate(ids):
        entry = ContainerEntry(one, project="p", agent=str(number), address=f"10.231.{number // 256}.{number % 256}")
        overseer.publish(ContainerSeen(entry))

    def change() -> None:
        for paused in (True, False):
            for one in ids[: COUNT // 2]:
                overseer.publish(ContainerPaused(one, paused=paused))

    benchmark(change)

    assert view.statistics()["version"] > 4096
    assert view.statistics()["ignored"] == 0
