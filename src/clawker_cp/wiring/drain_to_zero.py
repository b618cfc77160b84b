"""
Ends the server when no agent is left, and never because the engine cannot say whether one is.

A list that keeps failing is an alarm and a red health entry; enforcement stays, polling goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any

import structlog

from clawker_cp.agents.watcher import AgentListCeiling, AgentWatcher, AgentWatcherOptions, ListAgents
from clawker_cp.config import AGENT_LIST_LIMIT_S, DrainSettings
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.health import Health, HealthRegistry
from clawker_cp.wiring.health_keeper import Answer, Check

COMPONENT = "engine"
# The setting may say that there is no grace; a watcher reads 0 as its default.
NO_GRACE_S = 1e-6


def watcher_options(settings: DrainSettings) -> AgentWatcherOptions:
    """
    The options of `control-plane.yaml`.
    """
    return AgentWatcherOptions(
        poll_interval=settings.poll_s,
        missed_threshold=settings.zero_polls,
        grace_period=settings.grace_s or NO_GRACE_S,
        list_error_ceiling=settings.list_failures,
    )


class DrainToZero:
    """
    Watches until the host is empty, with a new watcher after each ceiling.

    While agents cannot be listed the component `engine` of `health` is failed; `guarded` keeps it so against
    a check of its own that answers. Nothing here touches enforcement.
    """

    def __init__(
        self,
        list_agents: ListAgents,
        on_drain_to_zero: Callable[[], Awaitable[None]],
        options: AgentWatcherOptions,
        health: HealthRegistry,
        log: Any = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        list_limit_s: float = AGENT_LIST_LIMIT_S,
    ) -> None:
        self._list_agents = list_agents
        self._on_drain_to_zero = on_drain_to_zero
        self._options = options
        self._health = health
        self._log = log if log is not None else structlog.get_logger()
        self._clock = clock
        self._list_limit_s = list_limit_s
        self._failing = ""

    @property
    def failing(self) -> str:
        """Why agents cannot be listed since the last ceiling, "" while they can."""
        return self._failing

    async def run(self) -> None:
        """
        Return when the host was empty and the callback has returned; raises what the callback raises.
        """
        while True:
            watcher = AgentWatcher(
                self._listed,
                self._on_drain_to_zero,
                self._options,
                self._log,
                clock=self._clock,
                list_limit_s=self._list_limit_s,
            )
            try:
                await watcher.run()
            except AgentListCeiling as error:
                self._alarm(error)
            else:
                return

    def guard(self, checks: Iterable[Check]) -> list[Check]:
        """
        The same checks, that of the component `engine` guarded.
        """
        return [replace(one, ask=self.guarded(one.ask)) if one.name == COMPONENT else one for one in checks]

    def guarded(self, ask: Callable[[], Awaitable[Answer]]) -> Callable[[], Awaitable[Answer]]:
        """
        Turn the check of the component `engine` into one that is failed while agents cannot be listed.
        """

        async def asked() -> Answer:
            return (Health.FAILED, self._failing) if self._failing else await ask()

        return asked

    async def _listed(self) -> Any:
        found = await self._list_agents()
        if self._failing:
            self._failing = ""
            self._log.info("drain_list_recovered")
            self._health.report(COMPONENT, Health.OK)
        return found

    def _alarm(self, error: AgentListCeiling) -> None:
        self._failing = str(error)
        self._log.error(
            "drain_list_failed",
            cause=str(error.last_failure) or type(error.last_failure).__name__,
            failures=error.failures,
            blast_radius="the server does not end by itself; enforcement stays as it is",
            retry_s=self._options.poll_interval,
        )
        if self._health.component(COMPONENT) is None:
            self._health.declare(COMPONENT)
        self._health.report(COMPONENT, Health.FAILED, self._failing)
