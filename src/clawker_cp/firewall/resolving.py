"""
The name tables in force, as the DNS gate asks them (`dns.ports.Policies`).

Between compile and kernel a plan is announced: the proxy's own questions are answered by it
already, agents' are not. The reconciler announces and publishes; the gate only asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from clawker_cp.firewall.names import NOT_ALLOWED, NameTables
from clawker_cp.firewall.plan import NameVerdict, Plan


class Materialiser(Protocol):
    """Calls names into being; the reconciler."""

    async def materialise(self, policy: int, name: str, /) -> None: ...


class PolicyNames:
    """What every policy says of names. Until the first `publish` nothing resolves (I1)."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tables: NameTables | None = None
        self._announced: NameTables | None = None
        self._materialiser: Materialiser | None = None
        self._clock = clock
        self._used: dict[tuple[int, str], float] = {}

    def serve_with(self, materialiser: Materialiser) -> None:
        """Set who makes listeners and certificates for names that need them."""
        self._materialiser = materialiser

    # -- the gate ----------------------------------------------------------------------------

    def decide(self, policy: int, name: str, /) -> NameVerdict:
        """Judge a name for a policy; never blocks."""
        if self._tables is None:
            return NOT_ALLOWED
        verdict = self._tables.decide(policy, name)
        table = self._tables.tables.get(policy)
        if table is not None and table.policy.concrete and name in table.policy.concrete:
            self._used[policy, name] = self._clock()
        return verdict

    async def prepare(self, policy: int, name: str, verdict: object, /) -> NameVerdict:
        """Return the verdict once the proxy serves the name; raises `ClawkerError` if it cannot."""
        del verdict
        if self._materialiser is not None:
            await self._materialiser.materialise(policy, name)
        self._used[policy, name] = self._clock()
        return self.decide(policy, name)

    def for_proxy(self, name: str, /) -> NameVerdict | None:
        """
        Return the strictest verdict that allows the name, of any policy in force or on its way.

        One cache serves all policies: private addresses only if all that allow the name want them.
        """
        found: NameVerdict | None = None
        for tables in (self._tables, self._announced):
            for table in tables.tables.values() if tables is not None else ():
                verdict = table.decide(name)
                if verdict.allowed and (found is None or (found.allow_private and not verdict.allow_private)):
                    found = verdict
        return found

    # -- the reconciler ----------------------------------------------------------------------

    def tables_for(self, plan: Plan) -> NameTables:
        """Make the tables of a plan; costs milliseconds per thousand names, so do it in a thread."""
        return NameTables(plan, self._tables)

    def announce(self, tables: NameTables | None) -> None:
        """Let the proxy's questions be answered by a plan that is being applied; None ends that."""
        self._announced = tables

    def publish(self, tables: NameTables) -> None:
        """Put a plan in force."""
        self._tables = tables
        self._announced = None
        live = {(number, name) for number, table in tables.tables.items() for name in table.policy.concrete}
        now = self._clock()
        self._used = {key: self._used.get(key, now) for key in live}

    def idle(self, longer_than_s: float) -> dict[int, set[str]]:
        """Return concrete names that nobody has asked for lately, by policy."""
        border = self._clock() - longer_than_s
        found: dict[int, set[str]] = {}
        for (policy, name), used in self._used.items():
            if used < border:
                found.setdefault(policy, set()).add(name)
        return found
