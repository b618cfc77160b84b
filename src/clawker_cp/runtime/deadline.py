"""
A time budget that is passed down: each step takes the smaller of its own cap and what is left.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from clawker_cp.errors import DeadlineExceeded
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock


class Deadline:
    """
    A point in monotonic time; `Deadline.never()` has none.
    """

    __slots__ = ("_at", "_clock")

    def __init__(self, at: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self._at = at
        self._clock = clock

    @classmethod
    def after(cls, seconds: float, clock: Clock = SYSTEM_CLOCK) -> Deadline:
        """
        Begin a budget of `seconds` now.
        """
        return cls(clock.monotonic() + seconds, clock)

    @classmethod
    def never(cls) -> Deadline:
        """
        A budget without end; steps still have their own caps.
        """
        return cls(math.inf)

    @property
    def expired(self) -> bool:
        return self.remaining() <= 0

    def remaining(self) -> float:
        """
        Seconds left, never below 0.
        """
        return max(0.0, self._at - self._clock.monotonic())

    def cap(self, seconds: float) -> float:
        """
        The smaller of a step's own cap and what is left.
        """
        return min(seconds, self.remaining())

    def sooner(self, seconds: float) -> Deadline:
        """
        A deadline for a part of the work: in `seconds`, or this one if that is earlier.
        """
        return Deadline(min(self._at, self._clock.monotonic() + seconds), self._clock)

    @asynccontextmanager
    async def limit(self, seconds: float, what: str) -> AsyncIterator[None]:
        """
        Bound a wait; raises `DeadlineExceeded` that says what was waited for and how long.
        """
        allowed = self.cap(seconds)
        timeout = asyncio.timeout(allowed)
        try:
            async with timeout:
                yield
        except TimeoutError as error:
            if not timeout.expired():
                raise  # somebody else's, from inside
            raise DeadlineExceeded(f"{what} took longer than {allowed:.3g} s") from error
