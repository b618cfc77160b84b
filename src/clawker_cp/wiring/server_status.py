"""
What the server says of itself: the components' checks, `GetStatus`, the agents' states for metrics.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

from clawker_cp import accel
from clawker_cp.agents.roster import Roster
from clawker_cp.engines.base import HostFeature
from clawker_cp.errors import ClawkerError
from clawker_cp.pki.tree import AuthTree
from clawker_cp.rpc.control_agents import Status
from clawker_cp.runtime.health import Health, HealthRegistry
from clawker_cp.wiring.firewall_control import gate_answers
from clawker_cp.wiring.health_keeper import Answer, Check, answered

EXPIRING = dt.timedelta(days=30)


class PolicyLike(Protocol):
    """The reconciler."""

    @property
    def healthy(self) -> bool: ...
    @property
    def readable(self) -> bool: ...

    version: int

    def statistics(self) -> dict[str, int]: ...


class KernelLike(Protocol):
    """`ebpf.Manager`."""

    @property
    def loaded(self) -> bool: ...
    def statistics(self) -> dict[str, int]: ...


class ProxyLike(Protocol):
    """`EnvoyStack`."""

    restarts: int

    async def is_healthy(self) -> bool: ...


class ServerStatus:
    """
    One per server. `up` says whether the firewall is on, `authority` which implementation gives tokens and
    `authority_answers` is its probe; `engine_answers` is "" or says what is wrong with the engine.
    """

    def __init__(
        self,
        policy: PolicyLike,
        kernel: KernelLike,
        proxy: ProxyLike,
        roster: Roster,
        tree: AuthTree,
        health: HealthRegistry,
        rows: Sequence[HostFeature],
        *,
        engine: str,
        dns_address: str,
        up: Callable[[], bool],
        is_ready: Callable[[], bool],
        authority: str,
        authority_answers: Callable[[], Awaitable[bool]],
        engine_answers: Callable[[], Awaitable[str]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._policy = policy
        self._kernel = kernel
        self._proxy = proxy
        self._roster = roster
        self._tree = tree
        self._health = health
        self._rows = tuple(rows)
        self._engine = engine
        self._dns_address = dns_address
        self._up = up
        self._is_ready = is_ready
        self._authority = authority
        self._authority_answers = authority_answers
        self._engine_answers = engine_answers
        self._wall = wall
        self._started_at = int(wall())
        self._restarts = 0

    def checks(self) -> list[Check]:
        """
        The components of the contract, and how each is asked.
        """

        def off() -> bool:
            return not self._up()

        return [
            Check("enforcement", self._ask_enforcement, "cgroup-ebpf", critical=True),
            Check("engine", self._ask_engine, self._engine),
            Check("envoy", self._ask_proxy, "wheel", critical=True),
            Check("dns", answered(partial(gate_answers, self._dns_address), off), "gate", critical=True),
            Check("authority", answered(self._authority_answers, lambda: False), self._authority, critical=True),
            Check("rules", self._ask_rules),
            Check("pki", self._ask_pki),
            Check("accel", self._ask_accel, accel.IMPLEMENTATION),
        ]

    def probes(self) -> list[tuple[str, Callable[[], Awaitable[bool]]]]:
        """
        What `/healthz` asks beyond the listeners; all well while the firewall is off.
        """

        async def enforcement() -> bool:
            return (await self._ask_enforcement())[0] in {Health.OK, Health.OFF}

        async def dns() -> bool:
            return not self._up() or await gate_answers(self._dns_address)

        async def envoy() -> bool:
            return not self._up() or await self._proxy.is_healthy()

        return [("enforcement", enforcement), ("dns", dns), ("envoy", envoy)]

    def status(self) -> Status:
        """
        The answer of `GetStatus`.
        """
        numbers = self._policy.statistics()
        return Status(
            version=version("clawker-cp"),
            ready=self._is_ready(),
            started_at_unix=self._started_at,
            policy_version=self._policy.version,
            policies=numbers["policies"],
            rules=numbers["rules"],
            engine=self._engine,
            stack="embedded",
            agents=tuple(self._roster),
            components=self._health.components(),
            host=self._rows,
        )

    def agent_states(self) -> Mapping[str, int]:
        """
        Agents by state, for metrics.
        """
        agents = list(self._roster)
        return {
            "enrolled": len(agents),
            "quarantined": sum(agent.quarantined for agent in agents),
            "bypassed": sum(agent.bypassed for agent in agents),
        }

    def policy_numbers(self) -> Mapping[str, float]:
        """
        Gauges of the policy, for metrics.
        """
        return {**self._policy.statistics(), "policy_version": self._policy.version}

    async def _ask_enforcement(self) -> Answer:
        if not self._up():
            return Health.OFF, "the firewall is off"
        if not self._kernel.loaded:
            return Health.FAILED, "the programs are not attached"
        numbers: Any = self._kernel.statistics()
        return Health.OK, f"{numbers['agents']} agents, {numbers['rows']} rows"

    async def _ask_engine(self) -> Answer:
        problem = await self._engine_answers()
        return (Health.FAILED, problem) if problem else (Health.OK, "")

    async def _ask_proxy(self) -> Answer:
        while self._restarts < self._proxy.restarts:
            self._restarts += 1
            self._health.restarted("envoy")
        return await answered(self._proxy.is_healthy, lambda: not self._up())()

    async def _ask_rules(self) -> Answer:
        if not self._policy.readable:
            return Health.FAILED, "the rules files cannot be read; the running policy stays"
        return (Health.OK, "") if self._policy.healthy else (Health.DEGRADED, "an accepted change is not live yet")

    async def _ask_pki(self) -> Answer:
        try:
            findings = await asyncio.to_thread(self._tree.findings)
        except ClawkerError as error:
            return Health.FAILED, str(error)
        broken = [f"{one.path.name} {one.problem}" for one in findings if one.problem]
        if broken:
            return Health.FAILED, "; ".join(broken)
        ends = [one.not_after for one in findings if one.not_after is not None]
        soon = min(ends, default=None)
        if soon is not None and soon - dt.datetime.fromtimestamp(self._wall(), dt.UTC) < EXPIRING:
            return Health.DEGRADED, f"a certificate ends on {soon:%Y-%m-%d}"
        return Health.OK, ""

    async def _ask_accel(self) -> Answer:
        return Health.OK, ""
