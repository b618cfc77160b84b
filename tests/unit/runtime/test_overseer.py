"""The bus: bounded queues, contained failures, honest counts, a deterministic end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from clawker_cp.config import BUS_STUCK_AFTER_S, REPEATED_LOG_EVERY_S
from clawker_cp.errors import Conflict, InvalidInput
from clawker_cp.runtime.overseer import Heartbeat, Overseer, SubscriberStuck
from clawker_cp.runtime.subscriptions import Overflow, SubscriberStatistics, Subscription
from clawker_cp.testing.clock import FakeClock
from clawker_cp.testing.loops import LOOPS


class Number(msgspec.Struct, frozen=True):
    value: int


class Special(Number, frozen=True):
    pass


@dataclass(frozen=True)
class Other:
    text: str


def waiting_in(items: Subscription[Any]) -> list[Any]:
    """What a reader gets without waiting."""
    found = []
    while True:
        step = items.__anext__()
        try:
            step.send(None)
        except StopIteration as done:
            found.append(done.value)
        except StopAsyncIteration:
            return found
        else:
            step.close()
            return found


@asynccontextmanager
async def following(overseer: Overseer, *args: Any, **named: Any) -> AsyncIterator[asyncio.Task[None]]:
    """`follow` as a task that stands when the block begins and is gone when it ends."""
    before = len(overseer.statistics().subscribers)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(overseer.follow(*args, **named))
        while len(overseer.statistics().subscribers) == before and not task.done():
            await asyncio.sleep(0)
        try:
            yield task
        finally:
            task.cancel()


async def settled() -> None:
    """Everybody who can run has run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_subscriber_hears_its_type_and_subclasses_in_order() -> None:
    """From when it began, of nothing else; structs and dataclasses alike."""
    overseer = Overseer()
    overseer.publish(Number(0))
    async with (
        overseer.subscription(Number, name="numbers") as numbers,
        overseer.subscription(Special, name="special") as special,
        overseer.subscription(Other, name="others") as others,
    ):
        for message in (Number(1), Other("a"), Special(2), Number(3)):
            overseer.publish(message)

        assert waiting_in(numbers) == [Number(1), Special(2), Number(3)]
        assert waiting_in(special) == [Special(2)]
        assert waiting_in(others) == [Other("a")]
    statistics = overseer.statistics()
    assert (statistics.published, statistics.unheard, statistics.delivered, statistics.lost) == (5, 1, 5, 0)
    assert statistics.subscribers == ()


async def test_an_iteration_gets_what_is_published_while_it_waits() -> None:
    """A waiting reader wakes for each message and ends with the bus."""
    overseer = Overseer()
    seen = []

    async def read() -> None:
        async with overseer.subscription(Number, name="n") as items:
            async for item in items:
                seen.append(item)

    async with asyncio.TaskGroup() as group:
        group.create_task(read())
        await settled()
        for number in range(3):
            overseer.publish(Number(number))
            await settled()
        overseer.close()

    assert seen == [Number(0), Number(1), Number(2)]


async def test_when_full_the_oldest_go_and_the_gap_comes_first() -> None:
    """Overflow, then the newest `capacity`; the publisher and others lose nothing."""
    overseer = Overseer()
    async with (
        overseer.subscription(Number, name="slow", capacity=2) as slow,
        overseer.subscription(Number, name="wide", capacity=9) as wide,
    ):
        for number in range(5):
            overseer.publish(Number(number))

        assert waiting_in(slow) == [Overflow(3), Number(3), Number(4)]
        assert waiting_in(wide) == [Number(n) for n in range(5)]
        slow_counts = overseer.statistics().subscribers[0]
        assert (slow_counts.delivered, slow_counts.lost, slow_counts.waiting) == (2, 3, 0)


async def test_when_full_the_newest_are_refused_and_the_gap_stands_where_they_would() -> None:
    """The gap lies between what was kept before it and what came after it."""
    overseer = Overseer()
    async with overseer.subscription(Number, name="n", capacity=3, when_full="drop_newest") as items:
        for number in range(5):
            overseer.publish(Number(number))
        first = [await anext(items), await anext(items)]
        overseer.publish(Number(5))

        assert first == [Number(0), Number(1)]
        assert waiting_in(items) == [Number(2), Overflow(2), Number(5)]
        assert overseer.statistics().lost == 2


async def test_a_filter_narrows_and_its_failure_is_contained() -> None:
    """What it refuses takes no room; what it raises is counted for this subscriber alone."""
    overseer = Overseer(FakeClock())
    with capture_logs() as logs:
        async with (
            overseer.subscription(Number, name="even", capacity=2, wanted=lambda n: 4 // n.value % 2 == 0) as even,
            overseer.subscription(Number, name="all") as everything,
        ):
            for value in (1, 0, 4, 2, 0):
                overseer.publish(Number(value))

            assert waiting_in(even) == [Number(1), Number(2)]
            assert len(waiting_in(everything)) == 5
            assert overseer.statistics().subscribers[0].failed == 2
    assert [(line["event"], line["subscriber"], line["part"]) for line in logs] == [
        ("subscriber_failed", "even", "filter")
    ]


async def test_a_handler_that_raises_harms_nobody_and_goes_on() -> None:
    """Each failure is counted, logged once in a while, and the next message is handled."""
    clock = FakeClock()
    overseer = Overseer(clock)
    handled: list[int] = []

    async def fragile(message: Number) -> None:
        if message.value % 2:
            raise ValueError(f"odd {message.value}")
        handled.append(message.value)

    with capture_logs() as logs:
        async with (
            following(overseer, Number, fragile, name="fragile") as task,
            overseer.subscription(Number, name="other") as other,
        ):
            for value in range(6):
                overseer.publish(Number(value))
            await settled()
            await clock.advance(REPEATED_LOG_EVERY_S)
            overseer.publish(Number(7))
            await settled()

            assert not task.done()
            assert handled == [0, 2, 4]
            assert len(waiting_in(other)) == 7
            counts = overseer.statistics().subscribers[0]
            assert (counts.delivered, counts.failed, counts.waiting) == (7, 4, 0)
    failures = [(line["cause"], line["failed"]) for line in logs if line["event"] == "subscriber_failed"]
    assert failures == [("ValueError: odd 1", 1), ("ValueError: odd 7", 4)]


async def test_a_follower_is_told_of_a_gap() -> None:
    """`on_overflow` runs where messages are missing, so that the subscriber can look for itself."""
    overseer = Overseer()
    seen: list[Any] = []
    held = asyncio.Event()

    async def handle(message: Number) -> None:
        seen.append(message.value)
        await held.wait()

    async def reconcile(overflow: Overflow) -> None:
        seen.append(overflow)

    async with following(overseer, Number, handle, name="n", capacity=1, on_overflow=reconcile):
        for value in range(2):
            overseer.publish(Number(value))
            await settled()
        overseer.publish(Number(2))
        held.set()
        await settled()

    assert seen == [0, Overflow(1), 2]


async def test_a_gap_nobody_asked_about_is_logged() -> None:
    """Without `on_overflow` a loss is a line that names the subscriber and how much it lost."""
    overseer = Overseer()

    async def handle(_message: Number) -> None:
        pass

    with capture_logs() as logs:
        async with following(overseer, Number, handle, name="n", capacity=1):
            for value in range(4):
                overseer.publish(Number(value))
            await settled()

    assert [(line["event"], line["subscriber"], line["lost"]) for line in logs] == [("subscriber_overflow", "n", 3)]


class Sums:
    """A view: the sum of all numbers."""

    kinds = (Number,)

    def __init__(self) -> None:
        self.total = 0

    def apply(self, message: Number) -> None:
        if message.value < 0:
            raise ValueError("negative")
        self.total += message.value


async def test_a_view_is_ahead_of_every_subscriber() -> None:
    """Who handles a message sees a view that has it; a view's failure is contained."""
    overseer = Overseer(FakeClock())
    sums = Sums()
    overseer.attach(sums)
    seen: list[tuple[int, int]] = []

    async def handle(message: Number) -> None:
        seen.append((message.value, sums.total))

    with capture_logs() as logs:
        async with following(overseer, Number, handle, name="n"):
            overseer.publish(Number(2))
            await settled()
            overseer.publish(Number(-1))
            overseer.publish(Number(3))

            assert sums.total == 5
            await settled()

    assert seen == [(2, 2), (-1, 5), (3, 5)]
    assert overseer.statistics().failed == 1
    assert [(line["subscriber"], line["part"]) for line in logs] == [("Sums", "view")]


async def test_ages_come_from_the_clock() -> None:
    """What waits has an age, what was handed out is pending until the reader comes back."""
    clock = FakeClock()
    overseer = Overseer(clock)
    async with overseer.subscription(Number, name="n") as items:
        overseer.publish(Number(1))
        await clock.advance(3)
        overseer.publish(Number(2))
        await clock.advance(1)
        waiting = overseer.statistics().subscribers[0]
        await anext(items)
        await clock.advance(2)
        handling = overseer.statistics().subscribers[0]
        await anext(items)
        await clock.advance(5)
        last = overseer.statistics().subscribers[0]
        assert waiting_in(items) == []
        back = overseer.statistics().subscribers[0]

    assert (waiting.waiting, waiting.oldest_age_s, waiting.pending_s) == (2, 4.0, 4.0)
    assert (handling.waiting, handling.oldest_age_s, handling.pending_s) == (1, 3.0, 3.0)
    assert (last.waiting, last.oldest_age_s, last.pending_s) == (0, 0.0, 5.0)
    assert back.pending_s == 0.0


async def test_a_stuck_subscriber_is_reported_once_and_so_is_its_recovery() -> None:
    """An event, a line and the hook when it sticks; a line and the hook when it moves; a slow watcher is neither."""
    clock = FakeClock()
    reported: list[tuple[str, ...]] = []

    def hook(stuck: tuple[SubscriberStatistics, ...]) -> None:
        reported.append(tuple(one.name for one in stuck))

    overseer = Overseer(clock, on_stuck=hook)
    held = asyncio.Event()

    async def hang(_message: Number) -> None:
        await held.wait()

    with capture_logs() as logs:
        async with (
            following(overseer, Number, hang, name="hangs"),
            overseer.subscription(Number, name="slow watcher", stuck_after_s=None),
            overseer.subscription(SubscriberStuck, name="alarms") as alarms,
            overseer.subscription(Heartbeat, name="beats") as beats,
        ):
            overseer.publish(Number(1))
            await settled()
            await clock.advance(BUS_STUCK_AFTER_S)
            overseer.beat()
            quiet = waiting_in(alarms)
            await clock.advance(1)
            overseer.beat()
            overseer.beat()
            told = waiting_in(alarms)
            held.set()
            await settled()
            overseer.beat()
            beaten = waiting_in(beats)

    assert quiet == []
    assert [(one.subscriber.name, one.subscriber.pending_s) for one in told] == [("hangs", BUS_STUCK_AFTER_S + 1)]
    assert reported == [("hangs",), ()]
    assert [line["event"] for line in logs] == ["subscriber_stuck", "subscriber_recovered"]
    assert len(beaten) == 4
    assert beaten[0].statistics.subscribers[0].name == "hangs"


async def test_the_heartbeat_repeats_and_outlives_its_hook() -> None:
    """A beat at once and every so often; a hook that raises is contained."""
    clock = FakeClock()

    def hook(_stuck: Any) -> None:
        raise RuntimeError("no health today")

    overseer = Overseer(clock, on_stuck=hook)
    async with (
        overseer.subscription(Heartbeat, name="beats", stuck_after_s=None) as beats,
        overseer.subscription(Number, name="never reads", stuck_after_s=5),
        asyncio.TaskGroup() as group,
    ):
        overseer.publish(Number(1))
        task = group.create_task(overseer.heartbeat(4))
        await clock.wait_sleeping()
        for _ in range(3):
            await clock.advance(4)
        task.cancel()

        assert len(waiting_in(beats)) == 4
    assert overseer.statistics().failed == 1


async def test_close_drains_what_waits_and_counts_what_comes_later() -> None:
    """Each subscriber gets all that was published before, then ends; a later subscriber ends at once."""
    overseer = Overseer()
    handled: list[int] = []

    async def slow(message: Number) -> None:
        await asyncio.sleep(0)
        handled.append(message.value)

    async with following(overseer, Number, slow, name="n") as task:
        for value in range(50):
            overseer.publish(Number(value))
        late = await overseer.aclose()
        overseer.publish(Number(99))

        assert late == ()
        assert task.done()
    assert handled == list(range(50))
    assert (overseer.statistics().published, overseer.statistics().refused) == (50, 1)
    async with overseer.subscription(Number, name="late") as items:
        assert [item async for item in items] == []
    assert await overseer.aclose() == ()


async def test_close_is_bounded_when_a_handler_hangs() -> None:
    """The handler under way is cancelled, what waited is lost and counted, the follower's owner is not cancelled."""
    overseer = Overseer()
    cancelled = []

    async def hang(message: Number) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(message.value)
            raise

    async with following(overseer, Number, hang, name="hangs") as task:
        for value in range(3):
            overseer.publish(Number(value))
        await settled()
        late = await overseer.aclose(limit_s=0.01)

        assert late == ("hangs",)
        assert task.done()
        assert not task.cancelled()
    assert cancelled == [0]
    statistics = overseer.statistics()
    assert (statistics.delivered, statistics.lost, statistics.failed) == (1, 2, 1)


async def test_close_is_bounded_when_a_reader_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sits on a message is named and finds the end when it comes back."""
    monkeypatch.setattr("clawker_cp.runtime.overseer.BUS_CUT_LIMIT_S", 0.01)
    overseer = Overseer()
    async with overseer.subscription(Number, name="away") as items:
        for value in range(2):
            overseer.publish(Number(value))
        await anext(items)
        late = await overseer.aclose(limit_s=0.01)

        assert late == ("away",)
        assert [item async for item in items] == []
    assert overseer.statistics().lost == 1


async def test_a_handlers_own_timeout_is_a_failure_like_any_other() -> None:
    """It is contained; only the bus' own limit ends a follower."""
    overseer = Overseer()

    async def late(_message: Number) -> None:
        raise TimeoutError("mine")

    async with following(overseer, Number, late, name="n") as task:
        overseer.publish(Number(1))
        await settled()

        assert not task.done()
        assert overseer.statistics().failed == 1


async def test_a_second_reader_is_refused() -> None:
    """Two readers would each see half the messages; the first goes on."""
    overseer = Overseer()
    async with overseer.subscription(Number, name="n") as items, asyncio.TaskGroup() as group:
        first = group.create_task(items.__anext__())
        await settled()
        with pytest.raises(Conflict, match="'n' has a reader already"):
            await anext(items)
        overseer.publish(Number(1))

        assert await first == Number(1)


@pytest.mark.parametrize("kind", [int, str, "Number"])
async def test_only_message_types_can_be_followed(kind: Any) -> None:
    """A subscription to what nobody would publish is a mistake that is told at once."""
    with pytest.raises(InvalidInput, match="neither a Struct nor a dataclass"):
        async with Overseer().subscription(kind, name="n"):
            pass


async def test_a_bound_below_one_is_refused() -> None:
    """A queue without room would lose everything."""
    with pytest.raises(InvalidInput, match="capacity 0"):
        async with Overseer().subscription(Number, name="n", capacity=0):
            pass


async def test_a_cancelled_read_loses_nothing() -> None:
    """Cancelled while it waits, and after it was woken but before it ran: the message is still there."""
    overseer = Overseer()
    async with overseer.subscription(Number, name="n") as items:
        for publish_first in (False, True):
            async with asyncio.TaskGroup() as group:
                read = group.create_task(items.__anext__())
                await settled()
                if publish_first:
                    overseer.publish(Number(1))  # wakes it, and before it runs:
                read.cancel()
            assert read.cancelled()
        assert await anext(items) == Number(1)


async def test_a_follower_cancelled_anywhere_leaves_a_working_bus() -> None:
    """Waiting, in its handler, in its overflow handler: it is gone, its counts stay, others are served."""
    overseer = Overseer()
    entered = asyncio.Event()

    async def hang(_item: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    async def nothing(_item: Any) -> None:
        pass

    async with overseer.subscription(Number, name="other") as other:
        for handler, on_overflow, count in ((nothing, None, 0), (hang, None, 1), (nothing, hang, 2)):
            entered.clear()
            async with following(overseer, Number, handler, name="n", capacity=1, on_overflow=on_overflow) as task:
                for value in range(count):
                    overseer.publish(Number(value))
                if count:
                    await entered.wait()
            assert task.cancelled()
            assert [one.name for one in overseer.statistics().subscribers] == ["other"]
        overseer.publish(Number(9))

        assert waiting_in(other)[-1] == Number(9)


async def test_a_cancelled_close_leaves_the_bus_closed_and_can_be_repeated() -> None:
    """The first wait was given up; nothing is taken any more, and the second one finishes."""
    overseer = Overseer()
    async with overseer.subscription(Number, name="n"), asyncio.TaskGroup() as group:
        closing = group.create_task(overseer.aclose())
        await settled()
        closing.cancel()
        await settled()
        overseer.publish(Number(1))

        assert overseer.closed
        assert overseer.statistics().refused == 1
    assert await overseer.aclose() == ()


async def test_a_heartbeat_cancelled_in_its_sleep_leaves_nothing() -> None:
    """The bus goes on without it."""
    clock = FakeClock()
    overseer = Overseer(clock)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(overseer.heartbeat())
        await clock.wait_sleeping()
        task.cancel()
    assert task.cancelled()
    assert clock.sleeping == 0
    assert overseer.statistics().published == 1


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "case",
    [
        test_an_iteration_gets_what_is_published_while_it_waits,
        test_a_handler_that_raises_harms_nobody_and_goes_on,
        test_a_stuck_subscriber_is_reported_once_and_so_is_its_recovery,
        test_close_drains_what_waits_and_counts_what_comes_later,
        test_close_is_bounded_when_a_handler_hangs,
        test_a_second_reader_is_refused,
        test_a_cancelled_read_loses_nothing,
        test_a_follower_cancelled_anywhere_leaves_a_working_bus,
        test_a_cancelled_close_leaves_the_bus_closed_and_can_be_repeated,
        test_a_heartbeat_cancelled_in_its_sleep_leaves_nothing,
    ],
)
def test_on_both_loops(case: Callable[[], Coroutine[Any, Any, None]], loop: Any) -> None:
    """What waits does the same on asyncio, which complains when debugged, and on uvloop."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(case())
