"""
One subscriber's bounded queue on the bus: order kept, losses counted and told where they happened.

Made by `runtime.overseer` only. All of it runs on one loop; nobody waits but the reader.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Generic, Literal, TypeVar

import msgspec

from clawker_cp.errors import Conflict
from clawker_cp.runtime.clock import Clock

T = TypeVar("T")
WhenFull = Literal["drop_oldest", "drop_newest"]


class Overflow(msgspec.Struct, frozen=True, gc=False):
    """
    So many messages are missing here; they stood exactly where this stands.
    """

    count: int


class SubscriberStatistics(msgspec.Struct, frozen=True, gc=False):
    """
    How one subscriber does. `delivered + lost + waiting` is what it was offered, but for `failed` offers.

    `failed` counts deliveries whose handler raised, and offers whose filter did. `oldest_age_s` is the age of what
    waits longest; `pending_s` how long the longest unfinished delivery takes, waiting or being handled.
    """

    name: str
    kind: str
    capacity: int
    delivered: int
    lost: int
    failed: int
    waiting: int
    oldest_age_s: float
    pending_s: float


class Subscription(Generic[T]):
    """
    An asynchronous iterator over the messages of one type, in the order they were published.

    At most `capacity` messages wait. When full, "drop_oldest" gives up the one that waited longest,
    "drop_newest" the one that comes; either way the reader gets `Overflow` in their place. Cancelling a
    wait loses nothing. One reader at a time: a second one raises `Conflict`.
    """

    def __init__(
        self,
        kind: type[T],
        name: str,
        *,
        capacity: int,
        when_full: WhenFull,
        wanted: Callable[[T], bool] | None,
        stuck_after_s: float | None,
        clock: Clock,
    ) -> None:
        self.kind = kind
        self.name = name
        self.stuck_after_s = stuck_after_s
        self.failed = 0
        self._capacity = capacity
        self._drop_oldest = when_full == "drop_oldest"
        self._wanted = wanted
        self._clock = clock
        # When it was published, and what; for "drop_newest" also an Overflow, which takes a place, so that
        # a reader that never catches up leaves at most one entry more than `capacity`.
        self._queue: deque[tuple[float, T | Overflow]] = deque()
        self._missing = 0  # given up in front of the queue, not told yet
        self._lost = 0
        self._delivered = 0
        self._taken_at: float | None = None  # when the reader got what it has not come back from
        self._reader: asyncio.Future[None] | None = None
        self._ended = False

    def offer(self, entry: tuple[float, T]) -> None:
        """
        Take a message with the time of its publication; never waits. Raises what the filter raises.
        """
        if self._ended or (self._wanted is not None and not self._wanted(entry[1])):
            return
        if len(self._queue) < self._capacity:
            self._queue.append(entry)
        else:
            self._lost += 1
            if self._drop_oldest:
                self._missing += 1
                self._queue.popleft()
                self._queue.append(entry)
            else:
                self._lose_newest(entry[0])
        self._wake()

    def end(self) -> None:
        """
        Nothing more will come: the reader gets what waits, and then its iteration ends.
        """
        self._ended = True
        self._wake()

    def abandon(self) -> None:
        """
        End at once: what waits is lost.
        """
        self._lost += sum(not isinstance(item, Overflow) for _at, item in self._queue)
        self._queue.clear()
        self._missing = 0
        self.end()

    def __aiter__(self) -> AsyncIterator[T | Overflow]:
        return self

    async def __anext__(self) -> T | Overflow:
        self._taken_at = None
        while True:
            if self._missing:
                count, self._missing = self._missing, 0
                return self._hand_out(Overflow(count))
            if self._queue:
                item = self._queue.popleft()[1]
                self._delivered += not isinstance(item, Overflow)
                return self._hand_out(item)
            if self._ended:
                raise StopAsyncIteration
            await self._wait_offered()

    def pending_s(self, now: float) -> float:
        """
        How long the longest unfinished delivery has taken at `now`, 0 when nothing is under way.
        """
        began = self._taken_at
        if self._queue and (began is None or self._queue[0][0] < began):
            began = self._queue[0][0]
        return 0.0 if began is None else max(0.0, now - began)

    def statistics(self, now: float) -> SubscriberStatistics:
        """
        The counts at `now`, a time of the bus' clock.
        """
        return SubscriberStatistics(
            name=self.name,
            kind=self.kind.__name__,
            capacity=self._capacity,
            delivered=self._delivered,
            lost=self._lost,
            failed=self.failed,
            waiting=sum(not isinstance(item, Overflow) for _at, item in self._queue),
            oldest_age_s=max(0.0, now - self._queue[0][0]) if self._queue else 0.0,
            pending_s=self.pending_s(now),
        )

    def _lose_newest(self, at: float) -> None:
        last = self._queue[-1][1] if self._queue else None
        if isinstance(last, Overflow):
            self._queue[-1] = (self._queue[-1][0], Overflow(last.count + 1))
        else:
            self._queue.append((at, Overflow(1)))

    def _hand_out(self, item: T | Overflow) -> T | Overflow:
        self._taken_at = self._clock.monotonic()
        return item

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def _wait_offered(self) -> None:
        if self._reader is not None:
            raise Conflict(f"subscription {self.name!r} has a reader already")
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None
