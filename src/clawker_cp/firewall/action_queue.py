"""
One queue for everything that changes policy: bounded, strictly in order (contract 6.1).

Consecutive items of one batch kind are worked on together. Knows nothing about rules; the
reconciler is its only user.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from clawker_cp.errors import Unavailable

QUEUE_LIMIT = 256

Outcome = Any  # a result, or the exception to raise at the caller
Handler = Callable[[Sequence[Any]], Awaitable[Sequence[Outcome]]]


@dataclass(eq=False, slots=True)
class _Item:
    handler: Handler
    payload: Any
    batch: str
    future: asyncio.Future[Any]


class ActionQueue:
    """
    Runs actions one after the other.

    When full or closed, `submit` raises `Unavailable` (`QUEUE_CLOSED`) at once. An accepted
    action runs to its end even if its caller goes away.
    """

    def __init__(self, limit: int = QUEUE_LIMIT) -> None:
        self._limit = limit
        self._items: deque[_Item] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    async def submit(self, handler: Handler, payload: Any = None, *, batch: str = "") -> Any:
        """
        Queue an action and return its outcome.

        The handler gets the payloads of all actions that are worked on together, and returns one
        outcome for each; without `batch` it is always one.
        """
        if self._closed:
            raise Unavailable("the control plane is shutting down, no change is taken", code="QUEUE_CLOSED")
        if len(self._items) >= self._limit:
            raise Unavailable(
                f"{self._limit} changes are waiting already", code="QUEUE_CLOSED", hint="try again in a moment"
            )
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_looked_at)
        self._items.append(_Item(handler, payload, batch, future))
        self._wake.set()
        return await asyncio.shield(future)

    async def run(self, tick: Callable[[], Awaitable[None]], interval_s: float) -> None:
        """Work until cancelled, or closed and empty; `tick` runs between actions every `interval_s`."""
        loop = asyncio.get_running_loop()
        following = loop.time() + interval_s
        while True:
            if self._items:
                await self._work()
            elif self._closed:
                return
            else:
                self._wake.clear()
                try:
                    async with asyncio.timeout_at(following):
                        await self._wake.wait()
                except TimeoutError:
                    pass
            if loop.time() >= following:
                await tick()
                following = loop.time() + interval_s

    def close(self) -> None:
        """Take nothing more; what was accepted still runs."""
        self._closed = True
        self._wake.set()

    async def _work(self) -> None:
        items = [self._items.popleft()]
        batch = items[0].batch
        while batch and self._items and self._items[0].batch == batch:
            items.append(self._items.popleft())
        try:
            outcomes = await items[0].handler([item.payload for item in items])
        except BaseException as failure:
            for item in items:
                if not item.future.done():
                    if isinstance(failure, Exception):
                        item.future.set_exception(failure)
                    else:
                        item.future.cancel()
            if not isinstance(failure, Exception):
                raise
            return
        for item, outcome in zip(items, outcomes, strict=True):
            if item.future.done():
                continue
            if isinstance(outcome, BaseException):
                item.future.set_exception(outcome)
            else:
                item.future.set_result(outcome)


def _looked_at(future: asyncio.Future[Any]) -> None:
    """Take note of a failure whose caller has gone, so that the loop does not warn about it."""
    if not future.cancelled():
        future.exception()
