"""
The end of a server: stages in order, each contained, each at most once, all within one budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from clawker_cp.errors import ClawkerError
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock

log = structlog.get_logger()

# What a stage gets although those before it used everything up: leaving takes a moment too.
LEAST_S = 1.0


class Drain:
    """
    One per life of a server. Whatever ends it runs the same stages; who comes second finds them done.

    A stage that fails or takes too long is logged and the next one runs. Cancelling ends the stage and is passed on.
    """

    def __init__(self, limit_s: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._until = 0.0
        self._done: set[str] = set()

    @property
    def begun(self) -> bool:
        """Whether the end has begun."""
        return self._until > 0

    def begin(self, **facts: Any) -> None:
        """
        From now on the budget runs; logs `drain_started` with `facts`. Later calls change nothing.
        """
        if not self.begun:
            self._until = self._clock.monotonic() + self._limit_s
            log.info("drain_started", **facts)

    async def stage(self, name: str, work: Callable[[], Awaitable[Any]]) -> None:
        """
        Run one stage within what is left of the budget, unless it was run before.
        """
        self.begin()
        if name in self._done:
            return
        self._done.add(name)
        left = max(self._until - self._clock.monotonic(), LEAST_S)
        try:
            async with asyncio.timeout(left):
                await work()
        except (ClawkerError, OSError, TimeoutError) as error:
            log.warning("drain_stage_failed", stage=name, cause=str(error) or f"not over within {left:.1f} s")
        except Exception as error:  # a cleanup loop: the stages after this one have to run
            log.error("drain_stage_failed", stage=name, cause=type(error).__name__, exc_info=error)
        else:
            log.info("drain_stage", stage=name)
