"""
The clock and its stand-in.
"""

from __future__ import annotations

import asyncio

from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.testing.clock import FakeClock


async def check(clock: Clock) -> None:
    before = clock.monotonic(), clock.monotonic_ns(), clock.wall_ns()
    await clock.sleep(0)
    assert clock.monotonic() >= before[0]
    assert clock.monotonic_ns() >= before[1]
    assert abs(clock.monotonic() - clock.monotonic_ns() / 1e9) < 1


async def test_both_keep_the_contract() -> None:
    """The real clock and the fake pass the same check."""
    await check(SYSTEM_CLOCK)
    await check(FakeClock())


async def test_sleepers_wake_in_order() -> None:
    """Time moves from deadline to deadline."""
    clock, woken = FakeClock(), list[tuple[str, float]]()

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper("late", 3))
        group.create_task(sleeper("soon", 1))
        await clock.wait_sleeping(2)
        await clock.advance(5)

    assert woken == [("soon", 1001.0), ("late", 1003.0)]
    assert clock.monotonic() == 1005.0
