"""
What state each component is in, since when, and whether `/healthz` is red.

Components report here; `/healthz`, `GetStatus` and metrics read. Nothing here probes by itself
except `Probes`, which asks in the order of the contract and remembers the answer for two seconds.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from clawker_cp.config import PROBE_KEPT_S, PROBE_LIMIT_S
from clawker_cp.errors import ClawkerError, NotFound
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock


class Health(enum.IntEnum):
    """Equal to the wire enum `Health`."""

    UNSPECIFIED = 0
    OK = 1
    DEGRADED = 2
    FAILED = 3
    OFF = 4


@dataclass(frozen=True, slots=True)
class Component:
    """
    One entry of `GetStatus`. `since_unix` belongs to the present health; `critical` takes part in /healthz.
    """

    name: str
    implementation: str = ""
    version: str = ""
    health: Health = Health.UNSPECIFIED
    detail: str = ""
    since_unix: int = 0
    critical: bool = False
    restarts: int = 0


class HealthRegistry:
    """
    The components, in the order they were declared. Used on the loop only.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._components: dict[str, Component] = {}
        self._listeners: list[Callable[[Component], None]] = []

    def declare(self, name: str, *, implementation: str = "", version: str = "", critical: bool = False) -> None:
        """
        Make a component known; declaring again changes its description, not its health.
        """
        known = self._components.get(name, Component(name, since_unix=self._now()))
        self._components[name] = replace(
            known, implementation=implementation, version=version, critical=critical or known.critical
        )

    def report(self, name: str, health: Health, detail: str = "") -> None:
        """
        Set a component's health; listeners hear of it only if health or detail changed.

        Raises `NotFound` for a name that was never declared.
        """
        known = self._components.get(name)
        if known is None:
            raise NotFound(f"health: component {name!r} was never declared")
        if (known.health, known.detail) == (health, detail):
            return
        since = known.since_unix if known.health == health else self._now()
        changed = replace(known, health=health, detail=detail, since_unix=since)
        self._components[name] = changed
        for listener in self._listeners:
            listener(changed)

    def restarted(self, name: str) -> None:
        """
        Count one restart.
        """
        known = self._components[name]
        self._components[name] = replace(known, restarts=known.restarts + 1)

    def on_change(self, listener: Callable[[Component], None]) -> None:
        """
        Call `listener` after every change; it must not block and not raise.
        """
        self._listeners.append(listener)

    def component(self, name: str) -> Component | None:
        return self._components.get(name)

    def components(self) -> tuple[Component, ...]:
        return tuple(self._components.values())

    def first_failed(self) -> Component | None:
        """
        The first critical component that has failed, None if all is well.
        """
        return next((c for c in self._components.values() if c.critical and c.health is Health.FAILED), None)

    def _now(self) -> int:
        return self._clock.wall_ns() // 1_000_000_000


Probe = Callable[[], Awaitable[bool]]


class Probes:
    """
    The probes of `/healthz`, in order; the first that fails is the answer.

    A probe that raises a `ClawkerError`, an `OSError` or takes longer than `PROBE_LIMIT_S` has failed. Answers are kept
    for `PROBE_KEPT_S`; questions at the same time share one round.
    """

    def __init__(self, probes: Sequence[tuple[str, Probe]], clock: Clock = SYSTEM_CLOCK) -> None:
        self._probes = tuple(probes)
        self._clock = clock
        self._lock = asyncio.Lock()
        self._answer = ""
        self._until = -1.0

    async def failed(self) -> str:
        """
        The name of the first probe that fails, "" if all is well.
        """
        async with self._lock:
            if self._clock.monotonic() >= self._until:
                self._answer = await self._ask()
                self._until = self._clock.monotonic() + PROBE_KEPT_S
            return self._answer

    async def _ask(self) -> str:
        for name, probe in self._probes:
            try:
                async with asyncio.timeout(PROBE_LIMIT_S):
                    if not await probe():
                        return name
            except (ClawkerError, OSError, TimeoutError):
                return name
        return ""
