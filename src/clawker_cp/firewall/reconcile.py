"""
What is wanted of the data plane: every verb that changes policy, one after the other, and time.

`data_plane.py` compiles a change as a whole (I5) and brings it into force; this holds the queue,
the stored rules and those that live as long as an agent. The application runs `run`, everything
else is called from anywhere on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import structlog

from clawker_cp.errors import CapacityExceeded, ClawkerError, NotFound
from clawker_cp.firewall import merge
from clawker_cp.firewall.action_queue import ActionQueue
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.changes import (
    AgentsTarget,
    Applied,
    EnvoyTarget,
    KernelTarget,
    Progress,
    Wanted,
    read_ephemeral,
    refusal,
)
from clawker_cp.firewall.compile import Compiled
from clawker_cp.firewall.data_plane import DataPlane
from clawker_cp.firewall.plan import (
    MAX_CONCRETE_NAMES,
    MAX_DEEP_SANS,
    Materialised,
    Plan,
    Topology,
)
from clawker_cp.firewall.resolving import PolicyNames
from clawker_cp.firewall.rules import Problem, Rule, RuleInvalid
from clawker_cp.firewall.store import RuleStore, Stored, store_failure
from clawker_cp.firewall.validate import validate

log = structlog.get_logger()

TICK_S = 0.5  # an expired rule is gone within a second
IDLE_S = 3600.0
IDLE_CHECK_S = 60.0


class Reconciler:
    """
    The only one who changes policy.

    All verbs are queued (256; full = `QUEUE_CLOSED`) and return when the change is enforced.
    `healthy` is False while something that was accepted could not be brought to the data plane;
    it is tried again every few seconds.
    """

    def __init__(
        self,
        store: RuleStore,
        files: AllocationFiles,
        envoy: EnvoyTarget,
        kernel: KernelTarget,
        agents: AgentsTarget,
        names: PolicyNames,
        topology: Topology | None = None,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._envoy = envoy
        self._names = names
        self._wall = wall
        self._monotonic = monotonic
        self._plane = DataPlane(
            files, envoy, kernel, agents, names, topology or Topology(), wall=wall, monotonic=monotonic
        )
        self._queue = ActionQueue()
        self._idle_at = 0.0
        self._unreadable = ""
        self.version = 0  # counts effective changes (contract 2.4)

    # -- state -------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan in force; raises `Unavailable` before the start."""
        return self._plane.compiled.plan

    @property
    def compiled(self) -> Compiled:
        """The plan in force with its effective rules."""
        return self._plane.compiled

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules in force, the stored ones first."""
        return self._plane.wanted.rules

    @property
    def topology(self) -> Topology:
        """What is known of this host; see `use_topology`."""
        return self._plane.topology

    @property
    def readable(self) -> bool:
        """Whether the rules files could be read when they were last looked at."""
        return not self._unreadable

    @property
    def healthy(self) -> bool:
        """Whether everything accepted is in force, and the rules files are readable."""
        return not self._plane.behind and not self._unreadable

    def statistics(self) -> dict[str, int]:
        """Counts for health and metrics."""
        plan = self.plan if self._plane.started else None
        return {
            "version": self._plane.version,
            "waiting": len(self._queue),
            "rules": len(self.rules),
            "policies": len(plan.policies) if plan else 0,
            "routes": len(plan.routes) if plan else 0,
            "behind": int(self._plane.behind),
        }

    # -- life --------------------------------------------------------------------------------

    def use_topology(self, topology: Topology) -> None:
        """Set what is known of this host; holds from the next compile on."""
        self._plane.topology = topology

    def preload(self, key: str, rules: str, *, learn: bool) -> None:
        """
        Take over, before `start`, the rules of an agent that ran on without us: its connections survive.

        Raises `RuleInvalid`.
        """
        self._plane.wanted = replace(
            self._plane.wanted,
            ephemeral=merge.add(self._plane.wanted.ephemeral, read_ephemeral(rules, key)).rules,
            agents=self._plane.wanted.agents | {key},
            learn=self._plane.wanted.learn | {key} if learn else self._plane.wanted.learn,
        )

    def policy_of(self, key: str) -> int:
        """Return the policy number of an agent; one nobody put has that of the global rules."""
        return self.plan.agents.get(key, 1)

    async def start(self) -> None:
        """
        Compile what is stored, start the proxy with it, write the maps, open the gate.

        Also after the stack was taken down; then called from inside `perform`.

        A rules file that cannot be read closes everything (R21); single bad rules are left out
        or widened (7.9). Raises what Envoy or the kernel raise: nothing is opened then.
        """
        stored = await asyncio.to_thread(self._store.read)
        wanted = replace(self._with_stored(self._plane.wanted, stored), unknown=bool(stored.unreadable))
        self._names.serve_with(self)
        await self._plane.start(wanted)
        self.version = self._plane.version

    async def run(self) -> None:
        """Work on changes until `close`; expiry, idle names and retries happen in between."""
        await self._queue.run(self._tick, TICK_S)

    def close(self) -> None:
        """Take no more changes; `run` returns when the accepted ones are done."""
        self._queue.close()

    # -- verbs -------------------------------------------------------------------------------

    async def reconcile(self) -> Applied:
        """Bring the data plane to the policy again; consecutive calls share one execution."""

        async def work(payloads: Sequence[Any]) -> Sequence[Applied]:
            return [await self._apply(self._plane.wanted, force=True)] * len(payloads)

        applied: Applied = await self._queue.submit(work, batch="reconcile")
        return applied

    async def reload(self) -> Applied:
        """Read the rules files again and apply them; a bad file changes nothing (`RULE_INVALID`)."""

        async def work(payloads: Sequence[Any]) -> Sequence[Applied]:
            stored = await asyncio.to_thread(self._store.read)
            if stored.unreadable:
                self._unreadable = stored.unreadable
                raise ClawkerError(f"the rules are not readable: {stored.unreadable}", code="RULE_INVALID")
            if stored.skipped:
                raise RuleInvalid(stored.skipped)
            return [await self._apply(self._with_stored(self._plane.wanted, stored), force=True)] * len(payloads)

        applied: Applied = await self._queue.submit(work, batch="reload")
        return applied

    async def perform(self, act: Callable[[], Awaitable[Any]]) -> Any:
        """Do something else that has its place among the changes: enrolling, releasing, taking the stack down."""

        async def work(_: Sequence[Any]) -> Sequence[Any]:
            return [await act()]

        return await self._queue.submit(work)

    async def judge_stored(self, change: Callable[[Sequence[Rule]], Sequence[Rule]]) -> list[Problem]:
        """
        Say what would be wrong with a change of the stored rules; nothing is written or applied.

        A problem's index is the position in what `change` returned.
        """

        async def work(_: Sequence[Any]) -> Sequence[list[Problem]]:
            return [await asyncio.to_thread(self._judge, change)]

        problems: list[Problem] = await self._queue.submit(work)
        return problems

    async def start_over(self) -> Applied:
        """
        Repair rules files that cannot be read: each is kept under another name, none of its rules holds.

        Readable files stay as they are. Raises `ClawkerError` with `RULE_STORE_WRITE`.
        """

        async def work(_: Sequence[Any]) -> Sequence[Applied]:
            await asyncio.to_thread(self._store.reset)
            stored = await asyncio.to_thread(self._store.read)
            return [await self._apply(self._with_stored(self._plane.wanted, stored), force=True)]

        applied: Applied = await self._queue.submit(work)
        return applied

    async def change_stored(
        self, change: Callable[[Sequence[Rule]], Sequence[Rule]], progress: Progress | None = None
    ) -> Applied:
        """
        Change the stored rules: `change` maps the present ones to the new ones (see `merge.py`).

        `progress.saved` turns true once the change is on disk, for callers that stop waiting.
        All or nothing. Raises `RuleInvalid`, `CapacityExceeded`, or `ClawkerError` with
        `RULE_STORE_WRITE` (nothing changed) or `STACK_UNHEALTHY`.
        """

        async def work(_: Sequence[Any]) -> Sequence[Applied]:
            return [await self._change_stored(change, progress)]

        applied: Applied = await self._queue.submit(work)
        return applied

    async def put_ephemeral(
        self, key: str, rules: str | Sequence[Rule | Mapping[str, Any]], *, learn: bool = False
    ) -> int:
        """
        Make an agent known, with rules that live as long as it (R26); returns its policy number.

        `rules` are a YAML document, or items of contract 7.1; whatever scope they name, they hold
        for this agent only. Raises `RuleInvalid` with every problem; then nothing changed.
        """

        async def work(_: Sequence[Any]) -> Sequence[int]:
            # Hand edits count from the next mutation on (7.9); rules nobody can read refuse it (R21).
            made, stored = await asyncio.to_thread(lambda: (read_ephemeral(rules, key), self._store.read()))
            if stored.unreadable:
                self._unreadable = stored.unreadable
                raise store_failure(f"the rules are not readable ({stored.unreadable}): repair them and reload")
            others = [rule for rule in self._plane.wanted.ephemeral if rule.scope != key]
            wanted = replace(
                self._with_stored(self._plane.wanted, stored),
                ephemeral=merge.add(others, made).rules,
                agents=self._plane.wanted.agents | {key},
                learn=self._plane.wanted.learn | {key} if learn else self._plane.wanted.learn - {key},
            )
            await self._apply(wanted)
            return [self.plan.agents[key]]

        policy: int = await self._queue.submit(work)
        return policy

    async def drop_ephemeral(self, key: str) -> None:
        """Forget an agent and its rules; fine if it is not known. Consecutive calls share one execution."""
        await self._queue.submit(self._drop, key, batch="drop")

    async def _drop(self, keys: Sequence[str]) -> Sequence[None]:
        ephemeral = self._plane.wanted.ephemeral
        for key in keys:
            ephemeral = merge.remove_scope(ephemeral, key).rules
        wanted = replace(
            self._plane.wanted,
            ephemeral=ephemeral,
            agents=self._plane.wanted.agents.difference(keys),
            learn=self._plane.wanted.learn.difference(keys),
        )
        await self._apply(wanted)
        return [None] * len(keys)

    async def materialise(self, policy: int, name: str, /) -> None:
        """
        Give a name below a wildcard what it needs: listeners of its own, a certificate.

        Returns when proxy and kernel have it. Raises `CapacityExceeded` when its rule has 64 live
        names (256 certificate names) already, `NotFound` if the policy is gone.
        """
        await self._queue.submit(self._materialise, (policy, name.rstrip(".").lower()), batch="materialise")

    # -- inner: what is wanted ---------------------------------------------------------------

    def _with_stored(self, wanted: Wanted, stored: Stored) -> Wanted:
        self._unreadable = stored.unreadable
        return replace(
            wanted,
            unknown=wanted.unknown and bool(stored.unreadable),
            stored=tuple(stored.rules),
            closing=tuple(stored.closing),
            close_wildcards=stored.close_wildcards,
        )

    async def _apply(
        self,
        wanted: Wanted,
        *,
        write: Callable[[], object] | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Applied:
        try:
            return await self._plane.apply(wanted, write=write, force=force, progress=progress)
        finally:
            self.version = self._plane.version

    async def _change_stored(
        self, change: Callable[[Sequence[Rule]], Sequence[Rule]], progress: Progress | None = None
    ) -> Applied:
        held, stored, rules = await asyncio.to_thread(self._hold, change)
        try:
            wanted = replace(self._with_stored(self._plane.wanted, stored), stored=rules)
            return await self._apply(wanted, write=partial(self._store.write, rules), progress=progress)
        finally:
            await asyncio.to_thread(held.close)

    def _hold(
        self, change: Callable[[Sequence[Rule]], Sequence[Rule]]
    ) -> tuple[contextlib.ExitStack, Stored, tuple[Rule, ...]]:
        """In a thread: lock the store, read it, and say what `change` makes of it; the caller lets go of the lock."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._store.lock())
            stored = self._store.read()
            if stored.unreadable:
                raise ClawkerError(
                    f"the rules are not readable ({stored.unreadable}); no rule was changed", code="RULE_STORE_WRITE"
                )
            rules = tuple(change(stored.rules))
            problems = validate(rules).problems
            if problems:
                raise refusal(list(problems))
            return stack.pop_all(), stored, rules

    def _judge(self, change: Callable[[Sequence[Rule]], Sequence[Rule]]) -> list[Problem]:
        stored = self._store.read()
        if stored.unreadable:
            raise store_failure(f"the rules are not readable ({stored.unreadable}): repair them and reload")
        rules = tuple(change(stored.rules))
        problems = list(validate(rules).problems)
        if problems:
            return problems
        # Their order is that of what is compiled first, so that an index means the same there.
        present = self._plane.wanted
        return self._plane.problems(Wanted(rules, agents=present.agents, ephemeral=present.ephemeral))

    async def _materialise(self, payloads: Sequence[Any]) -> Sequence[BaseException | None]:
        plan = self.plan
        outcomes: list[BaseException | None] = []
        concrete = dict(self._plane.wanted.concrete)
        for number, name in payloads:
            policy = plan.policies.get(number)
            if policy is None:
                outcomes.append(NotFound(f"policy {number} is gone"))
                continue
            verdict = self._names.decide(number, name)
            live = concrete.get(policy.key, Materialised())
            try:
                if verdict.concrete:
                    self._room(live.names, number, verdict.rule_id, MAX_CONCRETE_NAMES, "live names")
                    live = replace(live, names=live.names | {name})
                if verdict.san:
                    self._room(live.sans, number, verdict.rule_id, MAX_DEEP_SANS, "certificate names")
                    live = replace(live, sans=live.sans | {verdict.san})
            except CapacityExceeded as full:
                outcomes.append(full)
                continue
            concrete[policy.key] = live
            outcomes.append(None)
        if concrete != self._plane.wanted.concrete:
            await self._apply(replace(self._plane.wanted, concrete=concrete))
        return outcomes

    def _room(self, live: Collection[str], policy: int, rule_id: str, limit: int, what: str) -> None:
        table = {name for name in live if self._names.decide(policy, name.replace("*.", "x.", 1)).rule_id == rule_id}
        if len(table) >= limit:
            raise CapacityExceeded(
                f"rule {rule_id} has {limit} {what} already",
                limit="listeners",
                hint="names that nobody uses for an hour make room; or write rules for exact names",
            )

    # -- inner: time -------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Remove what has expired, retire idle names, try again what failed."""
        try:
            now = self._wall()
            gone = merge.expire(self._plane.wanted.stored, now).removed
            if gone:
                await self._change_stored(lambda rules: merge.expire(rules, now).rules)
                for rule in gone:
                    log.info("rule_expired", rule=rule.id, dst=rule.dst, scope=rule.scope)
            left = merge.expire(self._plane.wanted.ephemeral, now)
            if left.removed:
                await self._apply(replace(self._plane.wanted, ephemeral=left.rules))
            await self._plane.tend()
            if self._monotonic() >= self._idle_at:
                self._idle_at = self._monotonic() + IDLE_CHECK_S
                await self._retire()
        except (ClawkerError, OSError) as failure:
            self._plane.fell_behind(failure)
        finally:
            self.version = self._plane.version

    async def _retire(self) -> None:
        """Take away the listeners of concrete names that nobody has asked for or uses for an hour."""
        idle = self._names.idle(IDLE_S)
        if not idle or not self._envoy.running:
            return
        busy = await self._envoy.busy({name for names in idle.values() for name in names})
        concrete = dict(self._plane.wanted.concrete)
        for number, names in idle.items():
            policy = self.plan.policies.get(number)
            if policy is not None and policy.key in concrete:
                live = concrete[policy.key]
                concrete[policy.key] = replace(live, names=live.names - (names - busy))
        if concrete != self._plane.wanted.concrete:
            await self._apply(replace(self._plane.wanted, concrete=concrete))
