"""
Envoy, kernel, agents and gate as a journal of what they are told.

For tests of the order in which a change is applied; `tests/integration` has the real ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any

from clawker_cp.errors import ClawkerError, Unavailable
from clawker_cp.firewall.changes import Change
from clawker_cp.firewall.names import NameTables
from clawker_cp.firewall.plan import Plan
from clawker_cp.firewall.resolving import PolicyNames


class Journal:
    """Envoy, kernel and agents in one: what was said to whom, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._said = asyncio.Event()
        self.running = True
        self.refuse: ClawkerError | None = None
        self.ends_at = ""  # line at which Envoy ends instead
        self.judgement: ClawkerError | None = None
        self.staged: Plan | None = None
        self.kernel_failures = 0
        self.busy_names: set[str] = set()
        self.changes: list[Change] = []
        self.before_kernel: Callable[[], None] = lambda: None

    def say(self, line: str) -> None:
        """Note a line, on the loop."""
        self.lines.append(line)
        self._said.set()

    async def until(self, line: str) -> None:
        """Wait, five seconds at most, until a line is said."""
        async with asyncio.timeout(5):
            while line not in self.lines:
                self._said.clear()
                await self._said.wait()

    def took(self) -> list[str]:
        """Everything said since the last time."""
        lines, self.lines[:] = list(self.lines), []
        return lines

    async def start(self, plan: Plan) -> None:
        self.say("start")

    async def open(self, plan: Plan) -> int:
        if self.refuse is not None:
            raise self.refuse
        self._tell_envoy("envoy")
        return 1

    async def close(self) -> int:
        self._tell_envoy("envoy lets go")
        return 1

    def _tell_envoy(self, line: str) -> None:
        if line == self.ends_at:
            self.running = False
            raise Unavailable("Envoy does not answer")
        self.say(line)

    async def has_ended(self) -> bool:
        return not self.running

    async def validate(self, plan: Plan) -> None:
        self.say("judged")
        if self.judgement is not None:
            raise self.judgement

    async def stage(self, plan: Plan) -> None:
        self.staged = plan
        self.say("staged")

    async def busy(self, destinations: Collection[str]) -> set[str]:
        return self.busy_names & set(destinations)

    def sync_routes(self, routes: Any, cidrs: Any, ports: Any, /) -> None:
        if self.kernel_failures:
            self.kernel_failures -= 1
            raise ClawkerError("full", code="ROUTE_SYNC")
        self.before_kernel()
        self.lines.append("kernel")  # in a thread: wakes nobody

    async def set_policies(self, policies: Mapping[str, int], /) -> None:
        self.say(f"agents {dict(policies)}")

    async def admit(self, plan: Plan, /) -> None:
        self.admitted = plan

    async def cut(self, change: Change, /) -> int:
        self.changes.append(change)
        self.say("cut")
        return 3


class JournalNames(PolicyNames):
    """The real tables; publishing is noted as `gate`."""

    def __init__(self, journal: Journal, clock: Any) -> None:
        super().__init__(clock=clock)
        self.journal = journal

    def publish(self, tables: NameTables) -> None:
        super().publish(tables)
        self.journal.say("gate")
