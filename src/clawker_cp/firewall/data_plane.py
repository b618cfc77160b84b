"""
The policy in force, and the way from it to the next one: compile, order of R19, retry.

Owned by the reconciler, which says what is wanted, one call at a time. Everything that grows with
the number of rules happens in one thread per change, before anybody is told. Envoy, kernel, agents
and the gate's tables are passed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from clawker_cp.errors import ClawkerError, Unavailable
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
    changed_rules,
    log_rules,
    lost_destinations,
    moved_agents,
    only_closes,
    outlived,
    refusal,
    stored_not_live,
)
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.names import NameTables
from clawker_cp.firewall.plan import Plan, Topology
from clawker_cp.firewall.resolving import PolicyNames
from clawker_cp.firewall.rules import Problem, Rule
from clawker_cp.firewall.salvage import drop_until_it_compiles

log = structlog.get_logger()

RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class _Step:
    """What a change comes to, before anything of it is told to anybody; `change` is from what is in force."""

    compiled: Compiled
    wanted: Wanted
    tables: NameTables
    same: bool
    closing: bool
    cuts: bool
    change: Change
    touched: int
    rules: Sequence[tuple[str, Rule]]


class DataPlane:
    """
    Holds what was accepted last (`wanted`, `compiled`) and brings Envoy, kernel, gate and agents to it.

    `behind` is True while something accepted is not in force; `tend` tries it again every few
    seconds, as the change from what is in force, so that agents still move and connections are
    still cut. Not for two callers at once: the reconciler's queue sees to that.
    """

    def __init__(
        self,
        files: AllocationFiles,
        envoy: EnvoyTarget,
        kernel: KernelTarget,
        agents: AgentsTarget,
        names: PolicyNames,
        topology: Topology,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = files
        self._envoy = envoy
        self._kernel = kernel
        self._agents = agents
        self._names = names
        self._wall = wall
        self._monotonic = monotonic
        self._compiled: Compiled | None = None
        self._enforced: tuple[Plan, Wanted] | None = None
        self._allocations: Allocations = EMPTY
        self._unsaved = False
        self._retry_at = 0.0
        self.topology = topology
        self.wanted = Wanted()
        self.behind = False
        self.version = 0

    @property
    def started(self) -> bool:
        """Whether a policy is in force."""
        return self._compiled is not None

    @property
    def compiled(self) -> Compiled:
        """The plan in force with its effective rules; raises `Unavailable` before the start."""
        if self._compiled is None:
            raise Unavailable("no policy is in force yet")
        return self._compiled

    async def start(self, wanted: Wanted) -> None:
        """
        Start the proxy with what holds of `wanted`, write the maps, open the gate.

        Raises what Envoy or the kernel raise: nothing is opened then.
        """
        self.wanted = wanted
        compiled, tables = await asyncio.to_thread(self._first)
        self._names.announce(tables)
        await self._save(compiled.allocations)
        await self._envoy.start(compiled.plan)
        await self._write_kernel(compiled.plan)
        self._names.publish(tables)
        self._compiled = compiled
        self._enforced = compiled.plan, wanted
        self.behind = False
        self.version += 1
        log.info(
            "policy_applied", version=self.version, rules=len(wanted.rules), policies=len(compiled.plan.policies)
        )  # fmt: skip

    def problems(self, wanted: Wanted) -> list[Problem]:
        """Say what a compile would refuse; for a thread."""
        found = self._compile(wanted, wanted.rules)
        return found if isinstance(found, list) else []

    async def apply(
        self,
        wanted: Wanted,
        *,
        write: Callable[[], object] | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Applied:
        """
        Compile and apply; on success `wanted` is what holds. `write` stores the rules, in a thread.

        Opening: Envoy, store, kernel, gate, then Envoy lets go of what is gone. Closing: store,
        gate, kernel, Envoy.
        """
        began = self._monotonic()
        step = await asyncio.to_thread(self._step, wanted)
        if isinstance(step, list):
            refused = refusal(step)
            log.warning("policy_refused", cause=str(refused), code=refused.code, apply_us=self._since(began))
            raise refused
        if step.same and not force:
            await self._persist(write, None)
            self._accept(step)
            self._enforced = step.compiled.plan, step.wanted
            return Applied(self.version, live=self._envoy.running)
        plan, accepted, live = step.compiled.plan, self.compiled.plan, self._envoy.running
        if not step.closing:
            self._names.announce(step.tables)
            try:
                live = await self._open(plan, accepted, began)
                await self._persist(write, accepted)
            except BaseException:
                self._names.announce(None)
                raise
        else:
            await self._persist(write, None)
        # From here on the change is accepted: what fails is tried again, nothing is taken back.
        if progress is not None:
            progress.saved = True
        self._accept(step)
        if not step.same:
            self.version += 1
        if step.closing:
            self._names.publish(step.tables)
        # A number is durable before the kernel carries it: after a crash it must not come to mean another name.
        await self._save(step.compiled.allocations)
        try:
            live = await self._enforce(step, live=live)
        except (ClawkerError, OSError) as failure:
            self.fell_behind(failure)
            await self._tell(step)
            raise stored_not_live(failure) from failure
        cut = await self._agents.cut(step.change) if step.cuts else 0
        elapsed = self._since(began)
        if not step.same:
            log.info(
                "policy_applied", version=self.version, live=live, apply_us=elapsed, agents=step.touched,
                connections_cut=cut,
            )  # fmt: skip
            await self._tell(step)
        return Applied(self.version, live, elapsed, step.touched, cut)

    async def tend(self) -> None:
        """Try again what could not be brought into force, and what could not be kept on disk."""
        if self.behind and self._monotonic() >= self._retry_at:
            await self.apply(self.wanted, force=True)
        if self._unsaved:
            await self._save(self._allocations)

    def fell_behind(self, failure: BaseException) -> None:
        """Say that something accepted is not in force; `tend` tries again after a few seconds."""
        self.behind = True
        self._retry_at = self._monotonic() + RETRY_S
        log.error("policy_behind", cause=str(failure), version=self.version, retry_s=RETRY_S)

    # -- in a thread -------------------------------------------------------------------------

    def _first(self) -> tuple[Compiled, NameTables]:
        self._allocations = self._files.load().allocations
        compiled, skipped = drop_until_it_compiles(self.wanted.rules, lambda rules: self._compile(self.wanted, rules))
        for problem in skipped:
            log.warning("rule_skipped", dst=problem.dst, field=problem.field, problem=problem.text)
        return compiled, self._names.tables_for(compiled.plan)

    def _step(self, wanted: Wanted) -> _Step | list[Problem]:
        rules = wanted.rules
        found = self._compile(wanted, rules)
        if isinstance(found, list):
            return found
        new, accepted = found.plan, self.compiled.plan
        old, before = self._enforced or (accepted, self.wanted)
        change = Change(old, new, moved_agents(old, new), lost_destinations(old, new))
        return _Step(
            compiled=found,
            wanted=replace(outlived(wanted, accepted, new), concrete=dict(found.live)),
            tables=self._names.tables_for(new),
            same=new == accepted and not self.behind,
            closing=only_closes(before, wanted, old, new),
            cuts=bool(change.policies or change.moved),
            change=change,
            touched=agents_touched(old, new),
            rules=changed_rules(self.wanted.rules, rules),
        )

    def _compile(self, wanted: Wanted, rules: Sequence[Rule]) -> Compiled | list[Problem]:
        return compile_plan(
            rules,
            wanted.agents,
            self.topology,
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

    # -- on the loop -------------------------------------------------------------------------

    def _since(self, began: float) -> int:
        return int((self._monotonic() - began) * 1e6)

    def _accept(self, step: _Step) -> None:
        self._compiled = step.compiled
        self._unsaved = self._unsaved or step.compiled.allocations != self._allocations
        self._allocations = step.compiled.allocations
        self.wanted = step.wanted

    async def _open(self, plan: Plan, old: Plan, began: float) -> bool:
        """Bring Envoy to a plan, or have it judged for the next life of one that is down; whether Envoy carries it."""
        try:
            return await self._opened(plan)
        except ClawkerError as failure:
            log.warning("policy_refused", cause=str(failure), code=failure.code, apply_us=self._since(began))
            await self._put_back(old)
            raise

    async def _opened(self, plan: Plan) -> bool:
        if self._envoy.running:
            try:
                await self._envoy.open(plan)
            except ClawkerError as failure:
                if failure.code == "RULE_INVALID" or not await self._envoy.has_ended():
                    raise
                log.info("policy_without_envoy", cause=str(failure))
            else:
                return True
        await self._envoy.validate(plan)
        return False

    async def _put_back(self, plan: Plan) -> None:
        """Bring Envoy back to the plan that holds; if it is down, what it finds in its next life."""
        with contextlib.suppress(ClawkerError):
            if self._envoy.running:
                try:
                    await self._envoy.open(plan)
                    await self._envoy.close()
                except ClawkerError:
                    if not await self._envoy.has_ended():
                        raise
                else:
                    return
            await self._envoy.stage(plan)

    async def _persist(self, write: Callable[[], object] | None, undo: Plan | None) -> None:
        if write is None:
            return
        try:
            await asyncio.to_thread(write)
        except ClawkerError:
            if undo is not None:
                await self._put_back(undo)
            raise

    async def _enforce(self, step: _Step, *, live: bool) -> bool:
        """Bring an accepted plan into force; returns whether Envoy carries it or finds it in its next life."""
        plan = step.compiled.plan
        await self._write_kernel(plan)
        await self._agents.admit(plan)
        if step.change.moved:
            await self._agents.set_policies({agent: new for agent, (_, new) in step.change.moved.items()})
        self._names.publish(step.tables)
        live = live and await self._let_go(plan, first=step.closing)
        if not live:
            await self._envoy.stage(plan)
        self._enforced = plan, step.wanted
        self.behind = False
        return live

    async def _let_go(self, plan: Plan, *, first: bool) -> bool:
        """Take from Envoy what a plan does not have, `first` bringing it there; False if it ends meanwhile."""
        try:
            if first:
                await self._envoy.open(plan)
            await self._envoy.close()
        except ClawkerError as failure:
            if failure.code == "RULE_INVALID" or not await self._envoy.has_ended():
                raise
            log.info("policy_without_envoy", cause=str(failure))
            return False
        return True

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

    async def _tell(self, step: _Step) -> None:
        if step.rules:
            await asyncio.to_thread(log_rules, step.rules)
