"""
Events to whoever follows them.
"""

from __future__ import annotations

import asyncio

import pytest

from clawker_cp.config import EVENT_BUFFER
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.overseer import Overseer


async def test_topics() -> None:
    """A subscriber hears of its topics, in order, from when it began."""
    overseer = Overseer()
    overseer.publish("agent", "earlier")
    async with overseer.subscribe(["agent", "policy"]) as followed:
        overseer.publish("agent", "enrolled", container_id="c", cause="start")
        overseer.publish("auth", "token_refused")
        overseer.publish("policy", "policy_applied")
        heard = [await followed.wait_next(), await followed.wait_next()]

    assert [(e.topic, e.name) for e in heard] == [("agent", "enrolled"), ("policy", "policy_applied")]
    assert heard[0].fields == {"cause": "start"}
    assert overseer.statistics() == {"subscribers": 0, "published": 4, "lost": 0}


async def test_overflow_drops_the_oldest_and_says_so() -> None:
    """A slow subscriber loses the oldest, is told how many, and holds up nobody."""
    overseer = Overseer()
    async with overseer.subscribe() as followed:
        for number in range(EVENT_BUFFER + 3):
            overseer.publish("agent", str(number))
        first, second = await followed.wait_next(), await followed.wait_next()

    assert (first.name, first.fields) == ("subscriber_overflow", {"count": "3"})
    assert second.name == "3"
    assert overseer.statistics()["lost"] == 3


async def test_cancelled_wait_loses_nothing() -> None:
    """A reader that gave up waiting still gets the next event."""
    overseer = Overseer()
    async with overseer.subscribe() as followed:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await followed.wait_next()
        overseer.publish("health", "x")

        assert (await followed.wait_next()).name == "x"


async def test_unknown_topic() -> None:
    """A topic that does not exist is an error that lists those that do."""
    with pytest.raises(InvalidInput, match="'agents' is not one of engine, agent"):
        async with Overseer().subscribe(["agents"]):
            pass
