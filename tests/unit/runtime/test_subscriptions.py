"""Any order of publishing, reading, joining, leaving and closing, against a model that keeps everything."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.subscriptions import Overflow, Subscription, WhenFull
from clawker_cp.testing.clock import FakeClock


class Number(msgspec.Struct, frozen=True):
    value: int


@dataclass(eq=False)
class Reader:
    """A subscription and what it should hold: the whole stream, with a gap where messages were given up."""

    block: AbstractAsyncContextManager[Subscription[Number]]
    items: Subscription[Number]
    capacity: int
    when_full: WhenFull
    stream: deque[int | None] = field(default_factory=deque)  # None: one that was given up
    offered: int = 0
    read: list[Any] = field(default_factory=list)

    @property
    def places(self) -> int:
        """Places taken: a message each, and for "drop_newest" each gap between messages."""
        if self.when_full == "drop_oldest":
            return sum(one is not None for one in self.stream)
        before = [True, *(one is not None for one in self.stream)]
        return sum(one is not None or before[n] for n, one in enumerate(self.stream))

    def offer(self, value: int) -> None:
        self.offered += 1
        if self.places < self.capacity:
            self.stream.append(value)
        elif self.when_full == "drop_newest":
            self.stream.append(None)
        else:
            oldest = next(n for n, one in enumerate(self.stream) if one is not None)
            self.stream[oldest] = None
            self.stream.append(value)

    def next(self) -> Number | Overflow:
        gap = 0
        while self.stream and self.stream[0] is None:
            self.stream.popleft()
            gap += 1
        if gap:
            return Overflow(gap)
        value = self.stream.popleft()
        assert value is not None
        return Number(value)


def run(step: Any) -> Any:
    """Run a coroutine that does not wait."""
    try:
        step.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


class Bus(RuleBasedStateMachine):
    """The bus does what the model does."""

    readers = Bundle("readers")

    def __init__(self) -> None:
        super().__init__()
        self.overseer = Overseer(FakeClock())
        self.present: list[Reader] = []
        self.gone = [0, 0]
        self.published = 0
        self.refused = 0

    @rule(
        target=readers,
        capacity=st.integers(1, 4),
        when_full=st.sampled_from(["drop_oldest", "drop_newest"]),
    )
    def join(self, capacity: int, when_full: WhenFull) -> Reader:
        block = self.overseer.subscription(Number, name="r", capacity=capacity, when_full=when_full)
        reader = Reader(block, run(block.__aenter__()), capacity, when_full)
        self.present.append(reader)
        return reader

    @rule(count=st.integers(1, 7))
    def publish(self, count: int) -> None:
        for _ in range(count):
            if self.overseer.closed:
                self.refused += 1
            else:
                for reader in self.present:
                    reader.offer(self.published)
                self.published += 1
            self.overseer.publish(Number(self.published - 1))

    @rule(reader=readers, count=st.integers(1, 5))
    def read(self, reader: Reader, count: int) -> None:
        for _ in range(count):
            if not reader.stream:
                return
            found = run(reader.items.__anext__())
            assert found == reader.next()
            reader.read.append(found)

    @rule(reader=consumes(readers))
    def leave(self, reader: Reader) -> None:
        run(reader.block.__aexit__(None, None, None))
        self.present.remove(reader)
        # What waited at the end was not delivered: it is lost.
        delivered = sum(isinstance(one, Number) for one in reader.read)
        self.gone[0] += delivered
        self.gone[1] += reader.offered - delivered

    @precondition(lambda self: self.published > 10)
    @rule()
    def close(self) -> None:
        self.overseer.close()

    @rule(reader=readers)
    def read_to_the_end(self, reader: Reader) -> None:
        """Closed: it gets all that waits and then ends."""
        if not self.overseer.closed:
            return
        self.read(reader, len(reader.stream))
        try:
            reader.items.__anext__().send(None)
        except StopAsyncIteration:
            return
        raise AssertionError("it goes on")

    @invariant()
    def counts_are_exact_and_queues_bounded(self) -> None:
        statistics = self.overseer.statistics()
        assert (statistics.published, statistics.refused) == (self.published, self.refused)
        delivered, lost = self.gone
        for reader, counts in zip(self.present, statistics.subscribers, strict=True):
            assert counts.delivered + counts.lost + counts.waiting == reader.offered
            assert counts.waiting == sum(one is not None for one in reader.stream) <= reader.capacity
            assert len(reader.items._queue) <= reader.capacity + 1
            delivered += counts.delivered
            lost += counts.lost
        assert (statistics.delivered, statistics.lost) == (delivered, lost)

    @invariant()
    def each_reads_in_the_order_of_publishing(self) -> None:
        for reader in self.present:
            values = [one.value for one in reader.read if isinstance(one, Number)]
            assert values == sorted(set(values))


Bus.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBus = Bus.TestCase
