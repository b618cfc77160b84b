"""Tests of the queue that every change goes through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from clawker_cp.errors import Unavailable
from clawker_cp.firewall.action_queue import ActionQueue


async def _nothing() -> None:
    return None


@asynccontextmanager
async def _running(queue: ActionQueue) -> AsyncIterator[asyncio.TaskGroup]:
    async with asyncio.TaskGroup() as group:
        group.create_task(queue.run(_nothing, 10))
        yield group
        queue.close()


async def test_actions_run_in_order_one_at_a_time() -> None:
    """The second begins after the first has ended, however long that takes."""
    seen: list[str] = []

    def action(name: str) -> Any:
        async def work(_: Sequence[Any]) -> Sequence[Any]:
            seen.append(f"{name} begins")
            await asyncio.sleep(0)
            seen.append(f"{name} ends")
            return [name]

        return work

    queue = ActionQueue()
    async with _running(queue) as group:
        tasks = [group.create_task(queue.submit(action(name))) for name in ("a", "b")]
        results = [await task for task in tasks]

    assert results == ["a", "b"]
    assert seen == ["a begins", "a ends", "b begins", "b ends"]


async def test_consecutive_actions_of_a_kind_share_one_execution() -> None:
    """Three reconciles in a row are one; one after something else is its own."""
    runs: list[list[Any]] = []

    async def work(payloads: Sequence[Any]) -> Sequence[Any]:
        runs.append(list(payloads))
        return list(payloads)

    queue = ActionQueue()
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(queue.submit(work, n, batch="x")) for n in (1, 2, 3)]
        waiting.append(group.create_task(queue.submit(work, 4)))
        waiting.append(group.create_task(queue.submit(work, 5, batch="x")))
        await asyncio.sleep(0)
        queue.close()
        await queue.run(_nothing, 10)

    assert [task.result() for task in waiting] == [1, 2, 3, 4, 5]
    assert runs == [[1, 2, 3], [4], [5]]


async def test_a_failure_reaches_its_caller_only() -> None:
    """The queue goes on; in a batch each caller gets its own outcome."""

    async def bad(_: Sequence[Any]) -> Sequence[Any]:
        raise ValueError("no")

    async def mixed(payloads: Sequence[Any]) -> Sequence[Any]:
        return [KeyError(payload) if payload == 2 else payload for payload in payloads]

    queue = ActionQueue()
    async with _running(queue):
        with pytest.raises(ValueError, match="no"):
            await queue.submit(bad)
        assert await queue.submit(mixed, 1, batch="m") == 1
        with pytest.raises(KeyError):
            await queue.submit(mixed, 2, batch="m")


async def test_an_accepted_action_outlives_its_caller() -> None:
    """Cancelling the one who waits does not cancel the work."""
    done = asyncio.Event()
    begun = asyncio.Event()

    async def work(_: Sequence[Any]) -> Sequence[Any]:
        begun.set()
        await asyncio.sleep(0.01)
        done.set()
        return [None]

    queue = ActionQueue()
    async with _running(queue) as group:
        caller = group.create_task(queue.submit(work))
        await begun.wait()
        caller.cancel()
        await asyncio.wait_for(done.wait(), 5)


async def test_full_and_closed_are_said_at_once() -> None:
    """The item over the limit and everything after closing get QUEUE_CLOSED."""

    async def work(_: Sequence[Any]) -> Sequence[Any]:
        return [None]

    queue = ActionQueue(limit=2)
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(queue.submit(work))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as full:
            await queue.submit(work)
        queue.close()
        with pytest.raises(Unavailable) as closed:
            await queue.submit(work)
        await queue.run(_nothing, 10)

    assert (full.value.code, closed.value.code) == ("QUEUE_CLOSED", "QUEUE_CLOSED")


async def test_the_tick_runs_between_actions() -> None:
    """Time-driven work has its turn while nothing is asked for."""
    ticks = asyncio.Semaphore(0)

    async def tick() -> None:
        ticks.release()

    queue = ActionQueue()
    async with asyncio.TaskGroup() as group:
        group.create_task(queue.run(tick, 0.01))
        async with asyncio.timeout(5):
            for _ in range(3):
                await ticks.acquire()
        queue.close()
