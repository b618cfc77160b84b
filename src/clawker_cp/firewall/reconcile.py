"""
From rules to a data plane that enforces them: one task, one order, one version number.

Every change is compiled as a whole first (I5), applied in the order of R19, and undone where
Envoy refuses it. Envoy, kernel and agents are passed in; store and allocations are this
package's own. The application runs `run`, everything else is called from anywhere on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import structlog

from clawker_cp.errors import CapacityExceeded, ClawkerError, NotFound, Unavailable
from clawker_cp.firewall import merge
from clawker_cp.firewall.action_queue import ActionQueue
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.allocations import EMPTY, Allocations
from clawker_cp.firewall.changes import (
    AgentsTarget,
    Applied,
    Change,
    EnvoyTarget,
    KernelTarget,
    Progress,
    Wanted,
    agents_touched,
    log_rules,
    lost_destinations,
    moved_agents,
    only_closes,
    outlived,
    read_ephemeral,
    refusal,
    stored_not_live,
)
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.ephemeral import EphemeralRules
from clawker_cp.firewall.plan import (
    MAX_CONCRETE_NAMES,
    MAX_DEEP_SANS,
    Materialised,
    Plan,
    Topology,
)
from clawker_cp.firewall.resolving import PolicyNames
from clawker_cp.firewall.rules import Problem, Rule, RuleInvalid
from clawker_cp.firewall.salvage import drop_until_it_compiles
from clawker_cp.firewall.store import RuleStore, Stored, store_failure
from clawker_cp.firewall.validate import validate

log = structlog.get_logger()

TICK_S = 0.5  # an expired rule is gone within a second
IDLE_S = 3600.0
IDLE_CHECK_S = 60.0
RETRY_S = 5.0


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
        self._files = files
        self._envoy = envoy
        self._kernel = kernel
        self._agents = agents
        self._names = names
        self._topology = topology or Topology()
        self._wall = wall
        self._monotonic = monotonic
        self._queue = ActionQueue()
        self._ephemeral = EphemeralRules()
        self._wanted = Wanted()
        self._compiled: Compiled | None = None
        self._allocations: Allocations = EMPTY
        self._unsaved = False
        self._behind = False
        self._retry_at = 0.0
        self._idle_at = 0.0
        self._unreadable = ""
        self.version = 0

    # -- state -------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan in force; raises `Unavailable` before the start."""
        return self.compiled.plan

    @property
    def compiled(self) -> Compiled:
        """The plan in force with its effective rules."""
        if self._compiled is None:
            raise Unavailable("no policy is in force yet")
        return self._compiled

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules in force, the stored ones first."""
        return self._wanted.rules

    @property
    def topology(self) -> Topology:
        """What is known of this host; see `use_topology`."""
        return self._topology

    @property
    def readable(self) -> bool:
        """Whether the rules files could be read when they were last looked at."""
        return not self._unreadable

    @property
    def healthy(self) -> bool:
        """Whether everything accepted is in force, and the rules files are readable."""
        return not self._behind and not self._unreadable

    def statistics(self) -> dict[str, int]:
        """Counts for health and metrics."""
        plan = self._compiled.plan if self._compiled else None
        return {
            "version": self.version,
            "waiting": len(self._queue),
            "rules": len(self._wanted.rules),
            "policies": len(plan.policies) if plan else 0,
            "routes": len(plan.routes) if plan else 0,
            "behind": int(self._behind),
        }

    # -- life --------------------------------------------------------------------------------

    def use_topology(self, topology: Topology) -> None:
        """Set what is known of this host; holds from the next compile on."""
        self._topology = topology

    def preload(self, key: str, rules: str, *, learn: bool) -> None:
        """
        Take over, before `start`, the rules of an agent that ran on without us: its connections survive.

        Raises `RuleInvalid`.
        """
        self._ephemeral.commit(merge.add(self._ephemeral.rules, read_ephemeral(rules, key)).rules)
        self._wanted = replace(
            self._wanted,
            ephemeral=self._ephemeral.rules,
            agents=self._wanted.agents | {key},
            learn=self._wanted.learn | {key} if learn else self._wanted.learn,
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
        loaded = await asyncio.to_thread(self._files.load)
        self._allocations = loaded.allocations
        stored = await asyncio.to_thread(self._store.read)
        self._wanted = replace(self._with_stored(self._wanted, stored), unknown=bool(stored.unreadable))
        compiled, skipped = await asyncio.to_thread(self._compile_what_holds)
        for problem in skipped:
            log.warning("rule_skipped", dst=problem.dst, field=problem.field, problem=problem.text)
        tables = await asyncio.to_thread(self._names.tables_for, compiled.plan)
        self._names.serve_with(self)
        self._names.announce(tables)
        await self._save(compiled.allocations)
        await self._envoy.start(compiled.plan)
        await self._write_kernel(compiled.plan)
        self._names.publish(tables)
        self._compiled = compiled
        self._behind = False
        self.version += 1
        log.info("policy_applied", version=self.version, rules=len(self.rules), policies=len(compiled.plan.policies))

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
            return [await self._apply(self._wanted, force=True)] * len(payloads)

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
            return [await self._apply(self._with_stored(self._wanted, stored), force=True)] * len(payloads)

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
            stored = await asyncio.to_thread(self._store.read)
            if stored.unreadable:
                raise store_failure(f"the rules are not readable ({stored.unreadable}): repair them and reload")
            rules = tuple(change(stored.rules))
            problems = list(validate(rules).problems)
            if not problems:
                # Their order is that of what is compiled first, so that an index means the same there.
                wanted = Wanted(rules, agents=self._wanted.agents, ephemeral=self._wanted.ephemeral)
                found = await asyncio.to_thread(self._compile, wanted, wanted.rules)
                problems = found if isinstance(found, list) else []
            return [problems]

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
            return [await self._apply(self._with_stored(self._wanted, stored), force=True)]

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
        made = read_ephemeral(rules, key)

        async def work(_: Sequence[Any]) -> Sequence[int]:
            # Hand edits count from the next mutation on (7.9); rules nobody can read refuse it (R21).
            stored = await asyncio.to_thread(self._store.read)
            if stored.unreadable:
                self._unreadable = stored.unreadable
                raise store_failure(f"the rules are not readable ({stored.unreadable}): repair them and reload")
            others = [rule for rule in self._ephemeral.rules if rule.scope != key]
            added = merge.add(others, made).rules
            wanted = replace(
                self._with_stored(self._wanted, stored),
                ephemeral=added,
                agents=self._wanted.agents | {key},
                learn=self._wanted.learn | {key} if learn else self._wanted.learn - {key},
            )
            await self._apply(wanted)
            self._ephemeral.commit(added)
            return [self.plan.agents[key]]

        policy: int = await self._queue.submit(work)
        return policy

    async def drop_ephemeral(self, key: str) -> None:
        """Forget an agent and its rules; fine if it is not known."""

        async def work(_: Sequence[Any]) -> Sequence[None]:
            left = self._ephemeral.removing(key).rules
            wanted = replace(
                self._wanted,
                ephemeral=left,
                agents=self._wanted.agents - {key},
                learn=self._wanted.learn - {key},
            )
            await self._apply(wanted)
            self._ephemeral.commit(left)
            return [None]

        await self._queue.submit(work)

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

    async def _change_stored(
        self, change: Callable[[Sequence[Rule]], Sequence[Rule]], progress: Progress | None = None
    ) -> Applied:
        stack = contextlib.ExitStack()
        await asyncio.to_thread(stack.enter_context, self._store.lock())
        try:
            stored = await asyncio.to_thread(self._store.read)
            if stored.unreadable:
                raise ClawkerError(
                    f"the rules are not readable ({stored.unreadable}); no rule was changed", code="RULE_STORE_WRITE"
                )
            rules = tuple(change(stored.rules))
            validation = validate(rules)
            if validation.problems:
                raise refusal(list(validation.problems))
            wanted = replace(self._with_stored(self._wanted, stored), stored=rules)
            return await self._apply(wanted, write=rules, progress=progress)
        finally:
            await asyncio.to_thread(stack.close)

    async def _materialise(self, payloads: Sequence[Any]) -> Sequence[BaseException | None]:
        plan = self.plan
        outcomes: list[BaseException | None] = []
        concrete = dict(self._wanted.concrete)
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
        if concrete != self._wanted.concrete:
            await self._apply(replace(self._wanted, concrete=concrete))
        return outcomes

    def _room(self, live: Collection[str], policy: int, rule_id: str, limit: int, what: str) -> None:
        table = {name for name in live if self._names.decide(policy, name.replace("*.", "x.", 1)).rule_id == rule_id}
        if len(table) >= limit:
            raise CapacityExceeded(
                f"rule {rule_id} has {limit} {what} already",
                limit="listeners",
                hint="names that nobody uses for an hour make room; or write rules for exact names",
            )

    # -- inner: compile and apply ------------------------------------------------------------

    def _compile(self, wanted: Wanted, rules: Sequence[Rule]) -> Compiled | list[Problem]:
        return compile_plan(
            rules,
            wanted.agents,
            self._topology,
            self._allocations,
            concrete=wanted.concrete,
            now=self._wall(),
            learn=wanted.learning,
            lingering=self._lingering(wanted),
            previous=self._compiled,
        )

    def _lingering(self, wanted: Wanted) -> frozenset[str]:
        """Policy keys under which living agents may have connections: those before, and the present one."""
        if self._compiled is None:
            return frozenset()
        plan = self._compiled.plan
        present = {plan.policies[plan.agents[agent]].key for agent in wanted.agents if agent in plan.agents}
        return frozenset(present | {key for agent, key in wanted.former if agent in wanted.agents})

    def _compile_what_holds(self) -> tuple[Compiled, tuple[Problem, ...]]:
        return drop_until_it_compiles(self._wanted.rules, lambda rules: self._compile(self._wanted, rules))

    async def _apply(
        self,
        wanted: Wanted,
        *,
        write: tuple[Rule, ...] | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Applied:
        """
        Compile and apply; on success `wanted` is what holds.

        Opening: Envoy, store, kernel, gate, then Envoy lets go of what is gone. Closing: store,
        gate, kernel, Envoy.
        """
        began = self._monotonic()
        found = await asyncio.to_thread(self._compile, wanted, wanted.rules)
        if isinstance(found, list):
            refused = refusal(found)
            log.warning("policy_refused", cause=str(refused), code=refused.code, apply_us=self._since(began))
            raise refused
        old = self.plan
        same = found.plan == old and not self._behind
        if same and not force:
            if write is not None:
                await asyncio.to_thread(self._store.write, write)
            self._accept(wanted, found)
            return Applied(self.version, live=self._envoy.running)
        tables = await asyncio.to_thread(self._names.tables_for, found.plan)
        closing = only_closes(self._wanted, wanted, old, found.plan)
        live = self._envoy.running
        if not closing:
            self._names.announce(tables)
            try:
                await self._open(found.plan, old, began)
                await self._persist(write, old)
            except BaseException:
                self._names.announce(None)
                raise
        else:
            await self._persist(write, None)
        # From here on the change is accepted: what fails is tried again, nothing is taken back.
        if progress is not None:
            progress.saved = True
        previous = self._wanted
        self._accept(outlived(wanted, old, found.plan), found)
        if not same:
            self.version += 1
        if closing:
            self._names.publish(tables)
        # A number is durable before the kernel carries it: after a crash it must not come to mean another name.
        await self._save(found.allocations)
        try:
            await self._write_kernel(found.plan)
            await self._agents.admit(found.plan)
            moved = moved_agents(old, found.plan)
            if moved:
                await self._agents.set_policies({agent: new for agent, (_, new) in moved.items()})
            self._names.publish(tables)
            if live and closing:
                await self._envoy.open(found.plan)
            if live:
                await self._envoy.close()
            else:
                await self._envoy.stage(found.plan)
            self._behind = False
        except (ClawkerError, OSError) as failure:
            self._fell_behind(failure)
            raise stored_not_live(failure) from failure
        change = Change(old, found.plan, moved, lost_destinations(old, found.plan))
        cut = await self._agents.cut(change) if change.policies or moved else 0
        elapsed = self._since(began)
        touched = agents_touched(old, found.plan)
        if not same:
            log.info(
                "policy_applied", version=self.version, live=live, apply_us=elapsed, agents=touched,
                connections_cut=cut,
            )  # fmt: skip
            log_rules(previous.rules, wanted.rules)
        return Applied(self.version, live, elapsed, touched, cut)

    def _since(self, began: float) -> int:
        return int((self._monotonic() - began) * 1e6)

    def _accept(self, wanted: Wanted, compiled: Compiled) -> None:
        self._compiled = compiled
        self._unsaved = self._unsaved or compiled.allocations != self._allocations
        self._allocations = compiled.allocations
        self._wanted = replace(wanted, concrete=dict(compiled.live))

    async def _open(self, plan: Plan, old: Plan, began: float) -> None:
        if not self._envoy.running:
            await self._envoy.validate(plan)
            return
        try:
            await self._envoy.open(plan)
        except ClawkerError as failure:
            log.warning("policy_refused", cause=str(failure), code=failure.code, apply_us=self._since(began))
            if failure.code != "RULE_INVALID":  # silence: what it may still take must be the old again
                with contextlib.suppress(ClawkerError):
                    await self._envoy.open(old)
            raise

    async def _persist(self, write: tuple[Rule, ...] | None, undo: Plan | None) -> None:
        if write is None:
            return
        try:
            await asyncio.to_thread(self._store.write, write)
        except ClawkerError:
            if undo is not None and self._envoy.running:
                with contextlib.suppress(ClawkerError):
                    await self._envoy.open(undo)
                    await self._envoy.close()
            raise

    async def _write_kernel(self, plan: Plan) -> None:
        await asyncio.to_thread(self._kernel.sync_routes, plan.routes, tuple(plan.cidrs.values()), plan.proxy_ports)

    async def _save(self, allocations: Allocations) -> None:
        """Keep the numbers on disk; a failure is tried again at the next change."""
        try:
            await asyncio.to_thread(self._files.save, allocations)
            self._unsaved = False
        except ClawkerError as failure:
            self._unsaved = True
            log.error("allocations_unsaved", cause=str(failure))

    def _fell_behind(self, failure: BaseException) -> None:
        self._behind = True
        self._retry_at = self._monotonic() + RETRY_S
        log.error("policy_behind", cause=str(failure), version=self.version, retry_s=RETRY_S)

    # -- inner: time -------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Remove what has expired, retire idle names, try again what failed."""
        try:
            now = self._wall()
            gone = merge.expire(self._wanted.stored, now).removed
            if gone:
                await self._change_stored(lambda rules: merge.expire(rules, now).rules)
                for rule in gone:
                    log.info("rule_expired", rule=rule.id, dst=rule.dst, scope=rule.scope)
            left = merge.expire(self._wanted.ephemeral, now)
            if left.removed:
                await self._apply(replace(self._wanted, ephemeral=left.rules))
                self._ephemeral.commit(left.rules)
            if self._behind and self._monotonic() >= self._retry_at:
                await self._apply(self._wanted, force=True)
            if self._monotonic() >= self._idle_at:
                self._idle_at = self._monotonic() + IDLE_CHECK_S
                await self._retire()
            if self._unsaved:
                await self._save(self._allocations)
        except (ClawkerError, OSError) as failure:
            self._fell_behind(failure)

    async def _retire(self) -> None:
        """Take away the listeners of concrete names that nobody has asked for or uses for an hour."""
        idle = self._names.idle(IDLE_S)
        if not idle or not self._envoy.running:
            return
        busy = await self._envoy.busy({name for names in idle.values() for name in names})
        concrete = dict(self._wanted.concrete)
        for number, names in idle.items():
            policy = self.plan.policies.get(number)
            if policy is not None and policy.key in concrete:
                live = concrete[policy.key]
                concrete[policy.key] = replace(live, names=live.names - (names - busy))
        if concrete != self._wanted.concrete:
            await self._apply(replace(self._wanted, concrete=concrete))
