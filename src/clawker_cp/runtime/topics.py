"""
What happened, as operators watch it: one kind of message with a topic, a name and fields (contract 2.4).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Literal, get_args

import msgspec

from clawker_cp.config import EVENT_BUFFER
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.subscriptions import Overflow, Subscription

Topic = Literal["engine", "agent", "policy", "enforcement", "health", "auth"]
TOPICS: tuple[str, ...] = get_args(Topic)


class Event(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """
    One thing that happened; fields of the wire message `Event`. No secrets in `fields` (I11).
    """

    time_unix_ns: int
    topic: str
    name: str
    container_id: str = ""
    project: str = ""
    agent: str = ""
    fields: Mapping[str, str] = {}


class TopicWatch:
    """
    The events of some topics, in order; ends when the bus is closed.

    Events it did not get in time are one event `subscriber_overflow` of topic `health`.
    """

    def __init__(self, items: Subscription[Event], clock: Clock) -> None:
        self._items = items
        self._clock = clock

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        item = await anext(self._items)
        if isinstance(item, Overflow):
            return Event(self._clock.wall_ns(), "health", "subscriber_overflow", fields={"count": str(item.count)})
        return item


@asynccontextmanager
async def watch_topics(
    overseer: Overseer, topics: Iterable[str] = (), *, clock: Clock = SYSTEM_CLOCK
) -> AsyncIterator[TopicWatch]:
    """
    Follow some topics, or all; raises `InvalidInput` for an unknown one.

    The watcher may be as slow as it likes: `EVENT_BUFFER` events wait, then the oldest go.
    """
    wanted = frozenset(topics)
    unknown = sorted(wanted - set(TOPICS))
    if unknown:
        raise InvalidInput(f"topics: {unknown[0]!r} is not one of {', '.join(TOPICS)}")
    async with overseer.subscription(
        Event,
        name="watch_events",
        capacity=EVENT_BUFFER,
        wanted=(lambda event: event.topic in wanted) if wanted else None,
        stuck_after_s=None,
    ) as items:
        yield TopicWatch(items, clock)
