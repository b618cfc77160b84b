"""
Where time comes from: intervals from the monotonic clock, stamps from the wall clock.

Passed into whatever waits or measures, so that tests move time by hand (`testing.clock`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds for intervals, Unix nanoseconds for stamps, and waiting."""

    def monotonic(self) -> float:
        """Return seconds that never go back; only differences mean something."""
        ...

    def monotonic_ns(self) -> int:
        """Return nanoseconds of CLOCK_MONOTONIC, the clock of kernel deadlines."""
        ...

    def wall_ns(self) -> int:
        """Return Unix time in nanoseconds; may jump."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; cancelling ends the wait."""
        ...


class SystemClock:
    """
    The clock of the machine.
    """

    def monotonic(self) -> float:
        return time.monotonic()

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.time_ns()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


SYSTEM_CLOCK = SystemClock()
