"""
Supervised tasks: a part that fails is reported, retried with back-off, and never takes others along.

A critical part is the exception: its failure ends the group it runs in, which drains. This module is
the only one that may start a task outside a group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from clawker_cp.config import RETRY_MAX_S, RETRY_MIN_S, STABLE_AFTER_S
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.health import Health, HealthRegistry

log = structlog.get_logger()

T = TypeVar("T")
Factory = Callable[[], Awaitable[None]]


async def supervise(
    name: str,
    factory: Factory,
    *,
    blast_radius: str,
    critical: bool = False,
    health: HealthRegistry | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> None:
    """
    Run a part until it returns; a failure logs `<name>_unavailable` and starts it again after a pause.

    The pause doubles from `RETRY_MIN_S` to `RETRY_MAX_S`. A part that then ran `STABLE_AFTER_S`, or
    returned, has recovered: `<name>_recovered` is logged, its health is ok again and the pause
    starts small. Meanwhile the component `name` of `health` is red. A critical part is not retried: its
    exception is raised. Cancelling ends it.
    """
    part = _Part(name, blast_radius, health, clock)
    part.begin()
    while True:
        watch = asyncio.get_running_loop().create_task(part.watch(), name=f"{name}-stable")
        try:
            await factory()
            part.recovered()
            return
        except Exception as error:  # this is what supervising means
            if cancelled():  # it failed while it was being ended: nobody wants it again
                raise asyncio.CancelledError from error
            part.failed(error, critical=critical)
            if critical:
                raise
        finally:
            watch.cancel()
        await clock.sleep(part.next_pause())


class _Part:
    """State of one supervised part between its failures."""

    def __init__(self, name: str, blast_radius: str, health: HealthRegistry | None, clock: Clock) -> None:
        self._name = name
        self._blast_radius = blast_radius
        self._health = health
        self._clock = clock
        self._pause = RETRY_MIN_S
        self._down = False

    def begin(self) -> None:
        if self._health is not None:
            if self._health.component(self._name) is None:
                self._health.declare(self._name)
            self._health.report(self._name, Health.OK)

    async def watch(self) -> None:
        await self._clock.sleep(STABLE_AFTER_S)
        self.recovered()

    def failed(self, error: Exception, *, critical: bool) -> None:
        self._down = True
        cause = f"{type(error).__name__}: {error}"
        log.error(
            f"{self._name}_unavailable",
            cause=cause,
            blast_radius=self._blast_radius,
            retry_s=None if critical else self._pause,
            exc_info=error,
        )
        if self._health is not None:
            self._health.report(self._name, Health.FAILED, cause)
            if not critical:
                self._health.restarted(self._name)

    def recovered(self) -> None:
        self._pause = RETRY_MIN_S
        if self._down:
            self._down = False
            log.info(f"{self._name}_recovered")
            if self._health is not None:
                self._health.report(self._name, Health.OK)

    def next_pause(self) -> float:
        pause = self._pause
        self._pause = min(pause * 2, RETRY_MAX_S)
        return pause


async def wait_ended(task: asyncio.Task[Any]) -> None:
    """
    Wait until a task has ended, however; whoever stops waiting ends it.
    """
    try:
        await asyncio.wait([task])
    finally:
        task.cancel()


async def in_thread_to_the_end(call: Callable[[], T]) -> T:
    """
    Run a call in a thread and return when the thread is done with it, also when cancelled meanwhile.

    Cancelling `asyncio.to_thread` lets its caller go on and take away, close or give to others what the thread
    still uses: a descriptor's number, for one. The cancellation is raised afterwards.
    """
    running = asyncio.get_running_loop().run_in_executor(None, call)
    cut: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cut = error
    if cut is not None:
        running.exception()  # nobody else will ask
        raise cut
    return running.result()


def cancelled() -> bool:
    """
    Whether the task that asks is being cancelled.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def leaf_text(error: BaseException) -> str:
    """
    The first of what a group of failures is made of, in words.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
