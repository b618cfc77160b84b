"""
What happened, for whoever wants to know: typed topics with bounded buffers.

Publishing is synchronous, on the loop, and never waits (I12). Decisions are not events: they go to
`telemetry.flowlog`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Literal, get_args

import msgspec

from clawker_cp.config import EVENT_BUFFER
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock

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


class EventSubscription:
    """
    One reader's buffer of `EVENT_BUFFER` events.

    When full the oldest goes, `lost` counts it, and the reader gets one event
    `subscriber_overflow` of topic `health` before the next.
    """

    def __init__(self, topics: frozenset[str], clock: Clock) -> None:
        self._topics = topics
        self._clock = clock
        self._buffer: deque[Event] = deque(maxlen=EVENT_BUFFER)
        self._ready = asyncio.Event()
        self._untold = 0
        self.lost = 0

    def offer(self, event: Event) -> None:
        """
        Take an event of a wanted topic; never waits.
        """
        if event.topic not in self._topics:
            return
        if len(self._buffer) == EVENT_BUFFER:
            self.lost += 1
            self._untold += 1
        self._buffer.append(event)
        self._ready.set()

    async def wait_next(self) -> Event:
        """
        Wait for the next event. Cancelling loses nothing.
        """
        while True:
            if self._untold:
                count, self._untold = self._untold, 0
                return Event(self._clock.wall_ns(), "health", "subscriber_overflow", fields={"count": str(count)})
            if self._buffer:
                return self._buffer.popleft()
            self._ready.clear()
            await self._ready.wait()


class Overseer:
    """
    One per server; passes events on to whoever is subscribed at that moment, keeps none.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._subscriptions: set[EventSubscription] = set()
        self._published: Counter[str] = Counter()
        self._lost = 0

    def publish(
        self, topic: Topic, name: str, *, container_id: str = "", project: str = "", agent: str = "", **fields: str
    ) -> None:
        """
        Tell everybody who follows `topic`; never waits, never raises.
        """
        self.publish_fields(topic, name, container_id=container_id, project=project, agent=agent, fields=fields)

    def publish_fields(
        self,
        topic: Topic,
        name: str,
        *,
        container_id: str = "",
        project: str = "",
        agent: str = "",
        fields: Mapping[str, str],
    ) -> None:
        """
        The same with fields of any name.
        """
        event = Event(self._clock.wall_ns(), topic, name, container_id, project, agent, fields)
        self._published[topic] += 1
        for subscription in self._subscriptions:
            subscription.offer(event)

    @asynccontextmanager
    async def subscribe(self, topics: Iterable[str] = ()) -> AsyncIterator[EventSubscription]:
        """
        Follow some topics, or all; raises `InvalidInput` for an unknown one.
        """
        wanted = frozenset(topics)
        unknown = sorted(wanted - set(TOPICS))
        if unknown:
            raise InvalidInput(f"topics: {unknown[0]!r} is not one of {', '.join(TOPICS)}")
        subscription = EventSubscription(wanted or frozenset(TOPICS), self._clock)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            self._lost += subscription.lost

    def statistics(self) -> dict[str, int]:
        """
        Subscribers, events published and lost.
        """
        lost = self._lost + sum(s.lost for s in self._subscriptions)
        return {"subscribers": len(self._subscriptions), "published": self._published.total(), "lost": lost}
