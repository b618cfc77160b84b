"""
Asks every component how it is, every two seconds, and keeps the answers where status and metrics read them.

Never answers "healthy" for something that was not asked: what raises or takes too long has failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from clawker_cp.config import PROBE_KEPT_S, PROBE_LIMIT_S
from clawker_cp.errors import ClawkerError
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.health import Health, HealthRegistry

Answer = tuple[Health, str]


@dataclass(frozen=True, slots=True)
class Check:
    """One component and how to ask it."""

    name: str
    ask: Callable[[], Awaitable[Answer]]
    implementation: str = ""
    version: str = ""
    critical: bool = False


class HealthKeeper:
    """
    Keeps a `HealthRegistry` true. `ask_all` is one round; `run` repeats it until cancelled.

    `tell` hears after each round which critical component has failed, "" = none.
    """

    def __init__(
        self,
        registry: HealthRegistry,
        checks: Sequence[Check],
        clock: Clock = SYSTEM_CLOCK,
        *,
        tell: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._registry = registry
        self._checks = tuple(checks)
        self._clock = clock
        self._tell = tell
        for check in self._checks:
            registry.declare(
                check.name, implementation=check.implementation, version=check.version, critical=check.critical
            )

    async def ask_all(self) -> None:
        """
        Ask every component once; they are asked at the same time.
        """
        async with asyncio.TaskGroup() as group:
            for check in self._checks:
                group.create_task(self._ask(check), name=f"health-{check.name}")
        if self._tell is not None:
            failed = self._registry.first_failed()
            await self._tell(failed.name if failed is not None else "")

    async def run(self) -> None:
        """
        Ask again and again until cancelled.
        """
        while True:
            await self.ask_all()
            await self._clock.sleep(PROBE_KEPT_S)

    async def _ask(self, check: Check) -> None:
        try:
            async with asyncio.timeout(PROBE_LIMIT_S):
                health, detail = await check.ask()
        except (ClawkerError, OSError, TimeoutError) as error:
            health, detail = Health.FAILED, str(error) or type(error).__name__
        self._registry.report(check.name, health, detail)


def answered(probe: Callable[[], Awaitable[bool]], off: Callable[[], bool]) -> Callable[[], Awaitable[Answer]]:
    """
    Turn a yes-or-no probe into a check; OFF while `off` says that it is not meant to run.
    """

    async def ask() -> Answer:
        if off():
            return Health.OFF, "the firewall is off"
        return (Health.OK, "") if await probe() else (Health.FAILED, "does not answer")

    return ask
