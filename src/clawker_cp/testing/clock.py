"""
A clock that tests move by hand. Fulfils `runtime.clock.Clock`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools


class FakeClock:
    """
    Time stands still until `advance`, which wakes sleepers in the order of their deadlines.
    """

    def __init__(self, *, start_s: float = 1000.0, wall_ns: int = 1_800_000_000_000_000_000) -> None:
        self._now_ns = int(start_s * 1e9)
        self._wall_offset_ns = wall_ns - self._now_ns
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._slept = asyncio.Condition()

    def monotonic(self) -> float:
        return self._now_ns / 1e9

    def monotonic_ns(self) -> int:
        return self._now_ns

    def wall_ns(self) -> int:
        return self._now_ns + self._wall_offset_ns

    @property
    def sleeping(self) -> int:
        """How many wait now."""
        return sum(not future.done() for _when, _number, future in self._sleepers)

    async def sleep(self, seconds: float) -> None:
        """
        Wait until `advance` passes the deadline.
        """
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_ns + int(seconds * 1e9), next(self._numbers), future))
        async with self._slept:
            self._slept.notify_all()
        await future

    async def wait_sleeping(self, count: int = 1) -> None:
        """
        Wait until at least `count` tasks sleep on this clock.
        """
        async with self._slept:
            await self._slept.wait_for(lambda: self.sleeping >= count)

    async def advance(self, seconds: float) -> None:
        """
        Move time on; everybody who is due has run once when this returns.
        """
        until = self._now_ns + int(seconds * 1e9)
        while self._sleepers and self._sleepers[0][0] <= until:
            when, _number, future = heapq.heappop(self._sleepers)
            self._now_ns = when
            if not future.done():
                future.set_result(None)
                for _ in range(4):  # the sleeper, and what it wakes in turn
                    await asyncio.sleep(0)
        self._now_ns = until
