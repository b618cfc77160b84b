"""
Supervised parts: retried with back-off, reported, red meanwhile.
"""

from __future__ import annotations

import asyncio
import threading

import pytest
import structlog

from clawker_cp.config import RETRY_MAX_S, STABLE_AFTER_S
from clawker_cp.runtime.health import Health, HealthRegistry
from clawker_cp.runtime.tasks import cancelled, in_thread_to_the_end, leaf_text, supervise, wait_ended
from clawker_cp.testing.clock import FakeClock


class Part:
    """Fails as often as it is told, then runs until cancelled."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.starts = 0
        self.running = asyncio.Event()

    async def run(self) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise OSError("the disk is gone")
        self.running.set()
        await asyncio.Event().wait()


async def test_failures_are_retried_and_end() -> None:
    """A failing part is started again after growing pauses; once it runs for a while it has recovered."""
    clock, health, part = FakeClock(), HealthRegistry(), Part(2)
    with structlog.testing.capture_logs() as logs:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(supervise("disk", part.run, blast_radius="records", health=health, clock=clock))
            for pause in (0.5, 1.0):
                await clock.wait_sleeping()
                entry = health.component("disk")
                assert entry is not None
                assert entry.health is Health.FAILED
                await clock.advance(pause)
            async with asyncio.timeout(5):
                await part.running.wait()
            await clock.wait_sleeping()
            await clock.advance(STABLE_AFTER_S)
            task.cancel()

    events = [(entry["event"], entry.get("retry_s")) for entry in logs]
    assert events == [("disk_unavailable", 0.5), ("disk_unavailable", 1.0), ("disk_recovered", None)]
    assert logs[0]["blast_radius"] == "records"
    assert logs[0]["cause"] == "OSError: the disk is gone"
    entry = health.component("disk")
    assert entry is not None
    assert (entry.health, entry.restarts) == (Health.OK, 2)
    assert part.starts == 3


async def test_pause_is_capped() -> None:
    """However often a part fails, the pause does not grow beyond its cap."""
    clock, part = FakeClock(), Part(12)
    with structlog.testing.capture_logs() as logs:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(supervise("disk", part.run, blast_radius="", clock=clock))
            async with asyncio.timeout(5):
                while not part.running.is_set():
                    await clock.wait_sleeping()
                    await clock.advance(RETRY_MAX_S)
            task.cancel()

    assert max(entry["retry_s"] for entry in logs if "retry_s" in entry) == RETRY_MAX_S


async def test_critical_ends_the_group() -> None:
    """The failure of a critical part is raised, so its group ends."""
    with structlog.testing.capture_logs() as logs, pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(supervise("listener", Part(1).run, blast_radius="all", critical=True))

    assert isinstance(caught.value.exceptions[0], OSError)
    assert [entry["event"] for entry in logs] == ["listener_unavailable"]


async def test_cancel_while_running_and_while_pausing() -> None:
    """Cancelling ends a part at either wait and leaves no task behind."""
    for failures in (0, 1):
        clock, part = FakeClock(), Part(failures)
        task = asyncio.ensure_future(supervise("disk", part.run, blast_radius="", clock=clock))
        await clock.wait_sleeping()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)

        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_return_ends_supervision() -> None:
    """A part that returns is done."""

    async def once() -> None:
        return

    async with asyncio.timeout(5):
        await supervise("once", once, blast_radius="")


async def test_a_part_that_fails_while_it_is_ended_has_ended() -> None:
    """Its failure is not a reason to begin anew: whoever cancelled it waits for it."""
    begun = asyncio.Event()

    async def part() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            raise ValueError("on the way out")

    task = asyncio.ensure_future(supervise("part", part, blast_radius="none"))
    await begun.wait()
    task.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait([task])

    assert task.cancelled()


async def test_an_ended_task_is_waited_for_and_one_that_does_not_end_is_ended() -> None:
    """Whoever stops waiting takes the task along; how it ended is nobody's business here."""

    async def fails() -> None:
        raise RuntimeError("seen by its owner")

    failing = asyncio.ensure_future(fails())
    await wait_ended(failing)
    assert isinstance(failing.exception(), RuntimeError)
    endless = asyncio.ensure_future(asyncio.Event().wait())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await wait_ended(endless)
    with pytest.raises(asyncio.CancelledError):
        await endless


async def test_a_task_knows_that_it_is_being_cancelled() -> None:
    """So that what it does at its end is done only if nobody is in a hurry."""
    seen: list[bool] = []

    async def body() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            seen.append(cancelled())

    task = asyncio.ensure_future(body())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert seen == [True] and not cancelled()


def test_a_group_is_told_by_its_first_failure() -> None:
    """However deep it lies."""
    group = ExceptionGroup("a", [ExceptionGroup("b", [ValueError("inner")]), OSError("other")])
    assert leaf_text(group) == "ValueError: inner" and leaf_text(OSError("x")) == "OSError: x"


async def test_a_call_in_a_thread_is_over_when_its_caller_goes_on() -> None:
    """However often it is cancelled, it returns only when the thread is done, and then as cancelled."""
    begun, go_on, done = threading.Event(), threading.Event(), []

    def call() -> None:
        begun.set()
        assert go_on.wait(10)
        done.append(True)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(in_thread_to_the_end(call))
        while not begun.is_set():
            await asyncio.sleep(0)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
        go_on.set()
        await asyncio.wait([task])

    assert task.cancelled() and done == [True]


async def test_a_call_in_a_thread_gives_what_it_returns_or_raises() -> None:
    """Without a cancellation it is an ordinary call; a failure that a cancellation hides is not told as unread."""

    def fail() -> None:
        raise ValueError("no")

    assert await in_thread_to_the_end(lambda: 7) == 7
    with pytest.raises(ValueError, match="no"):
        await in_thread_to_the_end(fail)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(in_thread_to_the_end(fail))
        await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()
