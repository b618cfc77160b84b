"""Events to whoever watches topics."""

from __future__ import annotations

import asyncio

import pytest

from clawker_cp.config import EVENT_BUFFER
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.topics import Event, watch_topics
from clawker_cp.testing.clock import FakeClock


def event(topic: str, name: str, **fields: str) -> Event:
    return Event(1, topic, name, fields=fields)


async def test_topics() -> None:
    """A watcher hears of its topics, in order, from when it began."""
    overseer = Overseer()
    overseer.publish(event("agent", "earlier"))
    async with watch_topics(overseer, ["agent", "policy"]) as watched:
        overseer.publish(event("agent", "enrolled", cause="start"))
        overseer.publish(event("auth", "token_refused"))
        overseer.publish(event("policy", "policy_applied"))
        heard = [await anext(watched), await anext(watched)]

    assert [(e.topic, e.name) for e in heard] == [("agent", "enrolled"), ("policy", "policy_applied")]
    assert heard[0].fields == {"cause": "start"}


async def test_overflow_drops_the_oldest_and_says_so() -> None:
    """A slow watcher loses the oldest, is told how many by an event of its own, and never counts as stuck."""
    clock = FakeClock()
    overseer = Overseer(clock)
    async with watch_topics(overseer, clock=clock) as watched:
        for number in range(EVENT_BUFFER + 3):
            overseer.publish(event("agent", str(number)))
        first, second = await anext(watched), await anext(watched)
        await clock.advance(3600)
        overseer.beat()

        assert (first.topic, first.name, first.fields) == ("health", "subscriber_overflow", {"count": "3"})
        assert first.time_unix_ns == clock.wall_ns() - 3600 * 10**9
        assert second.name == "3"
        assert overseer.statistics().lost == 3
        assert overseer._stuck == set()


async def test_a_cancelled_wait_loses_nothing_and_the_end_of_the_bus_ends_it() -> None:
    """A watcher that gave up waiting still gets the next event, and after the last one it ends."""
    overseer = Overseer()
    async with watch_topics(overseer) as watched:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(watched)
        overseer.publish(event("health", "x"))
        overseer.close()

        assert [e.name async for e in watched] == ["x"]


async def test_unknown_topic() -> None:
    """A topic that does not exist is an error that lists those that do."""
    with pytest.raises(InvalidInput, match="'agents' is not one of engine, agent"):
        async with watch_topics(Overseer(), ["agents"]):
            pass
