"""
The typed event bus and the views folded from it: what happened, for whoever wants to know.

Publishing is synchronous, on the loop, and never waits (I12). The bus knows no message types of its own
but those about itself; what the rest of the server tells is in `runtime.topics` and in the domain
packages. Decisions are not events: they go to `telemetry.flowlog`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import msgspec
import structlog

from clawker_cp.config import (
    BUS_CLOSE_LIMIT_S,
    BUS_CUT_LIMIT_S,
    BUS_HEARTBEAT_S,
    BUS_STUCK_AFTER_S,
    REPEATED_LOG_EVERY_S,
    SUBSCRIBER_BUFFER,
)
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.subscriptions import Overflow, SubscriberStatistics, Subscription, WhenFull

log = structlog.get_logger()

T = TypeVar("T")


class BusStatistics(msgspec.Struct, frozen=True, gc=False):
    """
    Counts since the start, of subscribers that are gone too.

    `unheard` messages had neither subscriber nor view; `refused` came after `close`; `failed` are contained
    failures of handlers, filters and views.
    """

    published: int
    unheard: int
    refused: int
    delivered: int
    lost: int
    failed: int
    subscribers: tuple[SubscriberStatistics, ...]


class Heartbeat(msgspec.Struct, frozen=True, gc=False):
    """
    The bus lives, and how it does.
    """

    statistics: BusStatistics


class SubscriberStuck(msgspec.Struct, frozen=True, gc=False):
    """
    A subscriber has not finished a delivery for longer than its limit.
    """

    subscriber: SubscriberStatistics


class View(Protocol):
    """
    State folded from messages. `apply` is called inside `publish`: it must not wait and must not publish.
    """

    @property
    def kinds(self) -> tuple[type, ...]:
        """Return the types of message that it wants."""
        ...

    def apply(self, message: Any) -> None:
        """Take one message; what it raises is contained and counted."""
        ...


class Overseer:
    """
    One per server; passes each message on to whoever is subscribed to its type at that moment, keeps none.

    A type is a `msgspec.Struct` or a dataclass; its subclasses are delivered too. Every subscriber gets
    messages in the order of `publish`, each with a bound and a loss count of its own, and no failure of one
    reaches another or the publisher. A message is in every view when the first subscriber sees it.

    `on_stuck` hears, whenever that changes, which subscribers are stuck; none means that all is well again.
    """

    def __init__(
        self,
        clock: Clock = SYSTEM_CLOCK,
        *,
        on_stuck: Callable[[tuple[SubscriberStatistics, ...]], None] | None = None,
    ) -> None:
        self._clock = clock
        self._on_stuck = on_stuck
        self._subscriptions: list[Subscription[Any]] = []
        self._views: list[View] = []
        # By type of message, filled when one is first published and emptied when who listens changes.
        self._routes: dict[type, tuple[tuple[Subscription[Any], ...], tuple[View, ...]]] = {}
        self._stuck: set[Subscription[Any]] = set()
        self._limits: dict[Subscription[Any], asyncio.Timeout] = {}
        self._logged_at: dict[str, float] = {}
        self._closed = False
        self._left = asyncio.Event()
        self._published = self._unheard = self._refused = 0
        self._delivered = self._lost = self._failed = 0  # of subscribers that are gone, and of views

    @property
    def closed(self) -> bool:
        """Whether nothing is passed on any more."""
        return self._closed

    def publish(self, message: object) -> None:
        """
        Tell everybody who follows its type. Never waits and never raises; after `close` it only counts.
        """
        if self._closed:
            self._refused += 1
            return
        self._published += 1
        route = self._routes.get(type(message))
        if route is None:
            route = self._routes[type(message)] = self._route(type(message))
        subscriptions, views = route
        if subscriptions:
            entry = (self._clock.monotonic(), message)
            for subscription in subscriptions:
                try:
                    subscription.offer(entry)
                except Exception as error:  # noqa: BLE001 - one subscriber's failure reaches nobody else
                    subscription.failed += 1
                    self._log_failure(subscription.name, "filter", error)
        elif not views:
            self._unheard += 1
        for view in views:
            try:
                view.apply(message)
            except Exception as error:  # noqa: BLE001 - nor does a view's
                self._failed += 1
                self._log_failure(type(view).__name__, "view", error)

    def attach(self, view: View) -> None:
        """
        Fold every message of the view's types into it from now on, before any subscriber sees it.
        """
        self._views.append(view)
        self._routes.clear()

    @asynccontextmanager
    async def subscription(
        self,
        kind: type[T],
        *,
        name: str,
        capacity: int = SUBSCRIBER_BUFFER,
        when_full: WhenFull = "drop_oldest",
        wanted: Callable[[T], bool] | None = None,
        stuck_after_s: float | None = BUS_STUCK_AFTER_S,
    ) -> AsyncIterator[Subscription[T]]:
        """
        Follow one type from now until the block is left; `wanted` may narrow it, and must be a pure function.

        With `stuck_after_s` None the reader may take its time: it loses messages, but never counts as stuck.
        After `close` the iteration ends at once. Raises `InvalidInput` for a type that is no message or a
        bound below 1.
        """
        _check(kind, name, capacity)
        made = Subscription(
            kind,
            name,
            capacity=capacity,
            when_full=when_full,
            wanted=wanted,
            stuck_after_s=stuck_after_s,
            clock=self._clock,
        )
        if self._closed:
            made.end()
        self._subscriptions.append(made)
        self._routes.clear()
        try:
            yield made
        finally:
            self._forget(made)

    async def follow(
        self,
        kind: type[T],
        handler: Callable[[T], Awaitable[None]],
        *,
        name: str,
        capacity: int = SUBSCRIBER_BUFFER,
        when_full: WhenFull = "drop_oldest",
        on_overflow: Callable[[Overflow], Awaitable[None]] | None = None,
        stuck_after_s: float | None = BUS_STUCK_AFTER_S,
    ) -> None:
        """
        Await `handler` for each message, one after the other, until the bus is closed; cancelling ends it.

        What the handler raises is counted, logged as `subscriber_failed` (at most every `REPEATED_LOG_EVERY_S`),
        and the next message follows. `on_overflow` is awaited where messages are missing; without it they are
        logged. When `aclose` runs out of time it cancels the handler that is under way.
        """
        async with self.subscription(
            kind, name=name, capacity=capacity, when_full=when_full, stuck_after_s=stuck_after_s
        ) as items:
            try:
                async with asyncio.timeout(None) as limit:
                    self._limits[items] = limit
                    async for item in items:
                        await self._deliver(items, item, handler, on_overflow)
            except TimeoutError:
                # Only our own limit: a handler's TimeoutError was contained.
                items.failed += 1
                log.warning("subscriber_cut", subscriber=name)
            finally:
                self._limits.pop(items, None)

    def statistics(self) -> BusStatistics:
        """
        All counts now.
        """
        now = self._clock.monotonic()
        each = tuple(one.statistics(now) for one in self._subscriptions)
        return BusStatistics(
            published=self._published,
            unheard=self._unheard,
            refused=self._refused,
            delivered=self._delivered + sum(one.delivered for one in each),
            lost=self._lost + sum(one.lost for one in each),
            failed=self._failed + sum(one.failed for one in each),
            subscribers=each,
        )

    async def heartbeat(self, every_s: float = BUS_HEARTBEAT_S) -> None:
        """
        Call `beat` again and again until cancelled.
        """
        while True:
            self.beat()
            await self._clock.sleep(every_s)

    def beat(self) -> None:
        """
        Publish `Heartbeat`, and `SubscriberStuck` for each that has become stuck since the last beat.
        """
        now = self._clock.monotonic()
        stuck = {
            one
            for one in self._subscriptions
            if one.stuck_after_s is not None and one.pending_s(now) > one.stuck_after_s
        }
        before, self._stuck = self._stuck, stuck
        for one in sorted(stuck - before, key=_name):
            found = one.statistics(now)
            log.warning("subscriber_stuck", subscriber=one.name, pending_s=found.pending_s, waiting=found.waiting)
            self.publish(SubscriberStuck(found))
        for one in sorted(before - stuck, key=_name):
            log.info("subscriber_recovered", subscriber=one.name)
        if stuck != before and self._on_stuck is not None:
            try:
                self._on_stuck(tuple(one.statistics(now) for one in sorted(stuck, key=_name)))
            except Exception as error:  # noqa: BLE001 - who reports health must not end the heartbeat
                self._failed += 1
                self._log_failure("on_stuck", "hook", error)
        self.publish(Heartbeat(self.statistics()))

    def close(self) -> None:
        """
        Take nothing more: every subscriber gets what waits for it, and then its iteration ends. Idempotent.
        """
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end()

    async def aclose(self, limit_s: float = BUS_CLOSE_LIMIT_S) -> tuple[str, ...]:
        """
        Close, and wait until every subscriber has left; return the names of those that did not in time.

        Those lose what waits, and a handler under way is cancelled; they have `BUS_CUT_LIMIT_S` more to leave.
        Cancelling leaves the bus closed.
        """
        self.close()
        if await self._all_left(limit_s):
            return ()
        late = tuple(sorted(one.name for one in self._subscriptions))
        log.warning("bus_close_late", subscribers=", ".join(late), limit_s=limit_s)
        now = asyncio.get_running_loop().time()
        for subscription in self._subscriptions:
            subscription.abandon()
            if (limit := self._limits.get(subscription)) is not None:
                limit.reschedule(now)
        await self._all_left(BUS_CUT_LIMIT_S)
        return late

    async def _deliver(
        self,
        items: Subscription[T],
        item: T | Overflow,
        handler: Callable[[T], Awaitable[None]],
        on_overflow: Callable[[Overflow], Awaitable[None]] | None,
    ) -> None:
        try:
            if not isinstance(item, Overflow):
                await handler(item)
            elif on_overflow is not None:
                await on_overflow(item)
            elif self._may_log(f"{items.name} overflow"):
                log.warning("subscriber_overflow", subscriber=items.name, lost=items.statistics(0.0).lost)
        except Exception as error:  # noqa: BLE001 - the next message is delivered all the same
            items.failed += 1
            self._log_failure(items.name, "handler", error, failed=items.failed)

    async def _all_left(self, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                while self._subscriptions:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            return False
        return True

    def _route(self, kind: type) -> tuple[tuple[Subscription[Any], ...], tuple[View, ...]]:
        return (
            tuple(one for one in self._subscriptions if issubclass(kind, one.kind)),
            tuple(view for view in self._views if issubclass(kind, view.kinds)),
        )

    def _forget(self, subscription: Subscription[Any]) -> None:
        subscription.abandon()
        self._subscriptions.remove(subscription)
        self._routes.clear()
        last = subscription.statistics(0.0)
        self._delivered += last.delivered
        self._lost += last.lost
        self._failed += last.failed
        self._left.set()

    def _log_failure(self, name: str, part: str, error: Exception, **fields: int) -> None:
        if self._may_log(f"{name} {part}"):
            log.error(
                "subscriber_failed",
                subscriber=name,
                part=part,
                cause=f"{type(error).__name__}: {error}",
                exc_info=error,
                **fields,
            )

    def _may_log(self, what: str) -> bool:
        # Bounded: names of subscribers come from the code, not from anybody's input.
        now = self._clock.monotonic()
        if now - self._logged_at.get(what, -REPEATED_LOG_EVERY_S) < REPEATED_LOG_EVERY_S:
            return False
        self._logged_at[what] = now
        return True


def _check(kind: type, name: str, capacity: int) -> None:
    if not (isinstance(kind, type) and (issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind))):
        raise InvalidInput(f"subscription {name!r}: {kind!r} is neither a Struct nor a dataclass")
    if capacity < 1:
        raise InvalidInput(f"subscription {name!r}: capacity {capacity} is below 1")


def _name(subscription: Subscription[Any]) -> str:
    return subscription.name
