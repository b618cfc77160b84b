"""
Notices that no agent runs any more: polls the engine's count and calls back once (drain-to-zero).

Knows neither engine nor drain; both are passed in. What becomes of a count that cannot be had at all is the
application's business (`wiring.drain_to_zero`).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sized
from dataclasses import dataclass, fields
from typing import Any

import structlog

from clawker_cp.config import AGENT_LIST_LIMIT_S
from clawker_cp.errors import Conflict, InvalidInput, Unavailable
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.deadline import Deadline

ListAgents = Callable[[], Awaitable[int | Sized]]


@dataclass(frozen=True, slots=True)
class AgentWatcherOptions:
    """
    When a host counts as empty. Zero means the default; a negative value, or one that is no number, raises.

    `poll_interval` and `grace_period` are seconds, `missed_threshold` consecutive polls without an agent,
    `list_error_ceiling` consecutive polls that failed.
    """

    poll_interval: float = 30.0
    missed_threshold: int = 2
    grace_period: float = 60.0
    list_error_ceiling: int = 20

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            whole = option.type == "int"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise InvalidInput(f"{option.name}: {value!r} is not a {'whole ' * whole}number")
            if not math.isfinite(value) or value < 0:
                raise InvalidInput(f"{option.name}: {value} must be 0 (the default, {option.default}) or more")
            if value == 0:
                object.__setattr__(self, option.name, option.default)


class AgentListCeiling(Unavailable):
    """
    Listing agents failed too often in a row; nothing is known about whether any runs.

    `last_failure` is what the last poll raised, also the cause; `failures` how many polls failed.
    """

    def __init__(self, failures: int, last_failure: Exception) -> None:
        super().__init__(
            f"{failures} polls for running agents failed in a row, the last with {_in_words(last_failure)}",
            hint="see whether the container engine answers",
        )
        self.failures = failures
        self.last_failure = last_failure


class AgentWatcher:
    """
    Polls how many agents run and calls back once none did for long enough.

    `list_agents` returns the running agents, or their number; it has `list_limit_s` for an answer. Polls
    never overlap: the next begins `poll_interval` after the last one ended. `on_drain_to_zero` is
    awaited at most once in the life of a watcher.
    """

    def __init__(
        self,
        list_agents: ListAgents,
        on_drain_to_zero: Callable[[], Awaitable[None]],
        options: AgentWatcherOptions | None = None,
        log: Any = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        list_limit_s: float = AGENT_LIST_LIMIT_S,
    ) -> None:
        for name, given in (("list_agents", list_agents), ("on_drain_to_zero", on_drain_to_zero)):
            if not callable(given):
                raise InvalidInput(f"{name}: is missing or cannot be called")
        self._list_agents = list_agents
        self._on_drain_to_zero = on_drain_to_zero
        self._options = options if options is not None else AgentWatcherOptions()
        self._log = log if log is not None else structlog.get_logger()
        self._clock = clock
        self._list_limit_s = list_limit_s
        self._began = False
        self._zeros = 0
        self._failures = 0

    async def run(self) -> None:
        """
        Poll until no agent is left and the callback has returned; cancelling ends it.

        The grace period is elapsed time since entry, however many polls fit into it: polls without an agent
        count from the first, but the callback waits for its end. A poll that found an agent, or failed,
        begins the count of empty ones anew; any that succeeded begins that of failures anew.

        Raises what the callback raises, `AgentListCeiling` after `list_error_ceiling` failures in a row, and
        `Conflict` when it was called before.
        """
        if self._began:
            raise Conflict("this watcher ran already; make a new one")
        self._began = True
        grace_ends = self._clock.monotonic() + self._options.grace_period
        while True:
            await self._clock.sleep(self._options.poll_interval)
            await self._poll()
            if self._zeros >= self._options.missed_threshold and self._clock.monotonic() >= grace_ends:
                self._log.info("agent_watcher_drained_to_zero", polls=self._zeros)
                await self._on_drain_to_zero()
                return

    def statistics(self) -> dict[str, int]:
        """
        The present streaks: polls in a row without an agent, and polls in a row that failed.
        """
        return {"zero_polls": self._zeros, "list_failures": self._failures}

    async def _poll(self) -> None:
        try:
            async with Deadline.never().limit(self._list_limit_s, "listing the running agents"):
                count = _count(await self._list_agents())
        except Exception as error:  # whatever went wrong: how many run is not known, and not known is not zero
            self._zeros = 0
            self._failures += 1
            self._log.warning("agent_watcher_poll_failed", cause=_in_words(error), failures=self._failures)
            if self._failures >= self._options.list_error_ceiling:
                raise AgentListCeiling(self._failures, error) from error
            return
        self._failures = 0
        self._zeros = self._zeros + 1 if count == 0 else 0


def _count(found: int | Sized) -> int:
    count = found if isinstance(found, int) else len(found)
    if count < 0:
        raise InvalidInput(f"list_agents: said that {count} agents run")
    return count


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
