"""
The running policy: rules of the store and of runs, compiled as a whole and applied in safe order.

One change at a time: compile (I5), then opening Envoy -> kernel -> DNS, closing DNS -> kernel ->
Envoy (R19). A refusal leaves everything as it was. Also what the DNS gate asks (`dns.ports.Policies`).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog

from clawker_cp.errors import ClawkerError, InvalidInput, Unavailable
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.documents import read_rules
from clawker_cp.firewall.names import NameTables
from clawker_cp.firewall.plan import (
    MAX_CONCRETE_NAMES,
    MAX_DEEP_SANS,
    CidrRow,
    Materialised,
    NameVerdict,
    Plan,
    ProxyPort,
    RouteRow,
    Topology,
)
from clawker_cp.firewall.rules import Problem, Rule, RuleInvalid
from clawker_cp.firewall.salvage import close as close_faulty
from clawker_cp.firewall.salvage import drop_until_it_compiles
from clawker_cp.firewall.store import RuleStore

log = structlog.get_logger()

APPLY_LIMIT_S = 30.0


class Proxy(Protocol):
    """`firewall.envoy.stack.EnvoyStack`."""

    async def start(self, plan: Plan) -> None: ...
    async def open(self, plan: Plan) -> int: ...
    async def close(self) -> int: ...


class Kernel(Protocol):
    """The route verbs of `ebpf.Manager`."""

    def sync_routes(
        self, route_rows: Iterable[RouteRow], cidr_rows: Iterable[CidrRow], ports: Iterable[ProxyPort]
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Change:
    """What an applied change was: the plans before and after, and how long it took."""

    version: int
    before: Plan
    after: Plan
    elapsed_us: int


class PolicyService:
    """
    Owns the compiled policy. `on_change` is awaited after the kernel has a plan, before DNS and
    Envoy close: agents get their policy numbers there and connections are cut.
    """

    def __init__(
        self,
        store: RuleStore,
        allocations: AllocationFiles,
        proxy: Proxy,
        kernel: Kernel,
        on_change: Callable[[Change], Awaitable[None]],
    ) -> None:
        self._store = store
        self._files = allocations
        self._proxy = proxy
        self._kernel = kernel
        self._on_change = on_change
        self._topology = Topology()
        self._ephemeral: OrderedDict[str, tuple[Rule, ...]] = OrderedDict()
        self._learning: set[str] = set()
        self._stored: tuple[Rule, ...] = ()
        self._concrete: dict[str, Materialised] = {}
        self._compiled: Compiled | None = None
        self._tables: NameTables | None = None
        self._opening: NameTables | None = None
        self._lock = asyncio.Lock()
        self.version = 0

    @property
    def plan(self) -> Plan:
        """The plan in force. Raises `Unavailable` before `start`."""
        if self._compiled is None:
            raise Unavailable("no policy is compiled yet")
        return self._compiled.plan

    @property
    def rule_ids(self) -> tuple[str, ...]:
        """Rule ids by the index kernel rows carry."""
        return self.plan.rule_ids if self._compiled is not None else ()

    def preload(self, key: str, rules: str, *, learn: bool) -> None:
        """
        Take over a run's rules before `start`, so that connections of a sandbox that ran on survive.
        """
        self._ephemeral[key] = self._parse(key, rules)
        if learn:
            self._learning.add(key)

    @staticmethod
    def _parse(key: str, rules: str) -> tuple[Rule, ...]:
        return tuple(replace(rule, scope=key, source="control") for rule in read_rules(rules, scope=key))

    async def start(self, topology: Topology) -> None:
        """
        Read, compile and apply what is stored; a rule that does not compile closes, it never opens.
        """
        self._topology = topology
        stored = await asyncio.to_thread(self._store.read)
        if stored.unreadable:
            # Rules unknown: nothing is allowed until they are repaired (R21).
            rules: tuple[Rule, ...] = ()
        else:
            rules = tuple(close_faulty(stored.rules, stored.closing, stored.close_wildcards))
        loaded = await asyncio.to_thread(self._files.load)

        def attempt(candidate: Sequence[Rule]) -> Compiled | list[Problem]:
            everything = [*candidate, *(rule for own in self._ephemeral.values() for rule in own)]
            return compile_plan(
                everything,
                sorted(self._ephemeral),
                topology,
                loaded.allocations,
                now=time.time(),
                learn=frozenset(self._learning),
            )

        compiled, skipped = await asyncio.to_thread(drop_until_it_compiles, rules, attempt)
        for problem in skipped:
            log.warning("rule_skipped", dst=problem.dst, field=problem.field, problem=problem.text)
        self._stored = rules
        await asyncio.to_thread(self._files.save, compiled.allocations)
        self._opening = NameTables(compiled.plan)
        await self._proxy.start(compiled.plan)
        await asyncio.to_thread(self._to_kernel, compiled.plan)
        self._compiled, self._tables, self._opening = compiled, self._opening, None
        self.version += 1

    async def put_ephemeral(self, key: str, rules: str, *, learn: bool) -> int:
        """
        Enforce a run's own rules (a YAML document); returns the policy number of the agent.

        Raises `RuleInvalid` with every problem, and nothing has changed.
        """
        parsed = self._parse(key, rules)
        async with self._lock:
            before = (OrderedDict(self._ephemeral), set(self._learning))
            self._ephemeral[key] = parsed
            if learn:
                self._learning.add(key)
            try:
                await self._apply()
            except BaseException:
                self._ephemeral, self._learning = before
                raise
            return self.plan.agents[key]

    async def drop_ephemeral(self, key: str) -> None:
        """
        Forget a run's own rules; fine when there are none.
        """
        async with self._lock:
            known = self._ephemeral.pop(key, None)
            self._learning.discard(key)
            self._concrete.pop(key, None)
            if known is not None:
                await self._apply()

    # -- what the gate asks -------------------------------------------------------------------

    def decide(self, policy: int, name: str, /) -> NameVerdict:
        """
        Judge a name for a policy number; before the first plan nothing is allowed.
        """
        if self._tables is None:
            return NameVerdict(False, "not_allowed")
        return self._tables.decide(policy, name)

    def for_proxy(self, name: str, /) -> NameVerdict | None:
        """
        The strictest verdict that lets the proxy resolve a name, in the plan in force or being applied.
        """
        found: NameVerdict | None = None
        for tables in (self._opening, self._tables):
            for table in tables.tables.values() if tables is not None else ():
                verdict = table.decide(name)
                if verdict.allowed and (found is None or (found.allow_private and not verdict.allow_private)):
                    found = verdict
        return found

    async def prepare(self, policy: int, name: str, _verdict: object, /) -> NameVerdict:
        """
        Give a name below a wildcard the listener or certificate it needs, then judge again.

        Raises `ClawkerError` CAPACITY when its rule has too many live names.
        """
        async with self._lock:
            current = self.decide(policy, name)
            if not current.allowed or not (current.concrete or current.san):
                return current
            key = next((p.key for p in self.plan.policies.values() if p.id == policy), "")
            before = self._concrete.get(key, Materialised())
            names = before.names | {name} if current.concrete else before.names
            sans = before.sans | {current.san} if current.san else before.sans
            if len(names) > MAX_CONCRETE_NAMES or len(sans) > MAX_DEEP_SANS:
                raise ClawkerError("the wildcard rule has too many live names", code="CAPACITY")
            self._concrete[key] = Materialised(names, sans)
            try:
                await self._apply()
            except BaseException:
                self._concrete[key] = before
                raise
            return self.decide(policy, name)

    # -- applying -----------------------------------------------------------------------------

    async def _apply(self) -> None:
        started = time.perf_counter_ns()
        compiled = await asyncio.to_thread(self._compile)
        previous = self._compiled
        if previous is None:
            raise Unavailable("the policy service is not started")
        before = previous.plan
        async with asyncio.timeout(APPLY_LIMIT_S):
            # A number is durable before anything carries it.
            await asyncio.to_thread(self._files.save, compiled.allocations)
            self._opening = NameTables(compiled.plan, self._tables)
            try:
                await self._proxy.open(compiled.plan)
            except BaseException:
                self._opening = None
                raise
            await asyncio.to_thread(self._to_kernel, compiled.plan)
            self._compiled, self._tables, self._opening = compiled, self._opening, None
            self.version += 1
            change = Change(self.version, before, compiled.plan, (time.perf_counter_ns() - started) // 1000)
            await self._on_change(change)
            await self._proxy.close()
        log.info("policy_applied", version=self.version, apply_us=change.elapsed_us)

    def _compile(self) -> Compiled:
        previous = self._compiled
        rules = [*self._stored, *(rule for own in self._ephemeral.values() for rule in own)]
        result = compile_plan(
            rules,
            sorted(self._ephemeral),
            self._topology,
            previous.allocations if previous is not None else AllocationFiles.load(self._files).allocations,
            concrete=self._concrete,
            now=time.time(),
            learn=frozenset(self._learning),
            previous=previous,
        )
        if isinstance(result, list):
            raise RuleInvalid(result)
        return result

    def _to_kernel(self, plan: Plan) -> None:
        self._kernel.sync_routes(plan.routes, plan.cidrs.values(), plan.proxy_ports)


def require_rules_text(value: object) -> str:
    """
    The rules document of a request; absent = no rules.
    """
    if value is None:
        return "rules: []\n"
    if not isinstance(value, str):
        raise InvalidInput("rules: has to be a YAML document as text")
    return value
