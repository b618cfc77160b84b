"""
`clawker.admin.v1.AdminService`: the released CLI's service, answered from the domain handlers.

Reads requests, bounds how long an answer may take, writes results. Refusals are `ClawkerError`s; the
interceptors around this servicer turn them into statuses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from clawker_cp._proto.clawker.admin.v1 import admin_pb2
from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.merge import AddStatus, RemoveStatus
from clawker_cp.firewall.rules import Rule
from clawker_cp.rpc.limits import LONG_ANSWER_S, answer_within, within
from clawker_cp.rpc.rule_messages import egress_from_rule, rule_from_egress

SOS_KEPT_S = 2.0


@dataclass(frozen=True, slots=True)
class FirewallAddresses:
    """Where agents find proxy and gate, and the network they are on."""

    proxy: str
    dns: str
    network_id: str
    cidr: str = ""


@dataclass(frozen=True, slots=True)
class FirewallState:
    """Answer of `FirewallStatus`; the healths are probes at most 2 s old."""

    running: bool
    proxy_healthy: bool
    dns_healthy: bool
    rules: int
    addresses: FirewallAddresses


class FirewallHandler(Protocol):
    """The firewall domain, as the released CLI commands it. `limit_s` bounds the wait, not the work."""

    async def init(self, *, limit_s: float) -> FirewallAddresses: ...
    async def remove(self, *, limit_s: float) -> None: ...
    async def enable(self, container_id: str) -> None: ...
    async def disable(self, container_id: str) -> None: ...
    async def bypass(self, container_id: str, seconds: int) -> None: ...
    async def add_rules(self, rules: Sequence[Rule], *, limit_s: float) -> tuple[list[AddStatus], bool]: ...
    async def remove_rule(
        self, dst: str, proto: str, port: str, path: str, *, everything: bool, limit_s: float
    ) -> tuple[RemoveStatus, bool]: ...
    def list_rules(self) -> list[Rule]: ...
    async def reload(self, *, limit_s: float) -> bool: ...
    async def status(self) -> FirewallState: ...
    async def rotate_ca(self, *, limit_s: float) -> bool: ...
    async def sync_routes(self, *, limit_s: float) -> int: ...
    async def resolve_hostname(self, hostname: str) -> list[str]: ...


class RegisteredLike(Protocol):
    """One row of the registry."""

    @property
    def thumbprint(self) -> str: ...
    @property
    def container_id(self) -> str: ...
    @property
    def agent(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def registered_at(self) -> int: ...
    @property
    def last_seen(self) -> int: ...


class AgentsHandler(Protocol):
    """The registry; blocks for the disk, so it is asked in a thread."""

    def snapshot(self) -> Sequence[RegisteredLike]: ...


class StartOutcome(Protocol):
    """How the start went: `runtime.startup`."""

    async def wait_outcome(self) -> str:
        """Wait for the end of the start: "" when ready, else why it failed."""
        ...


def new_admin_server(
    firewall: FirewallHandler, agents: AgentsHandler, log: Any = None, *, start: StartOutcome | None = None
) -> AdminServicer:
    """
    Compose the AdminService servicer from its domain handlers.

    `agents` is required: this process is the registry's only writer, so a wiring without it is a
    programming error and raises `TypeError`.
    """
    if agents is None or firewall is None:
        raise TypeError("new_admin_server needs the firewall handler and the agents' registry")
    return AdminServicer(firewall, agents, start, log or structlog.get_logger())


class AdminServicer:
    """
    One method per RPC, as the generated server calls them.
    """

    def __init__(
        self,
        firewall: FirewallHandler,
        agents: AgentsHandler,
        start: StartOutcome | None,
        log: Any,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._firewall = firewall
        self._agents = agents
        self._start = start
        self._log = log
        self._wall_ns = wall_ns

    async def FirewallInit(self, request: Any, context: Any) -> admin_pb2.FirewallInitResult:
        found = await self._firewall.init(limit_s=answer_within(context, LONG_ANSWER_S))
        return admin_pb2.FirewallInitResult(envoy_ip=found.proxy, coredns_ip=found.dns, network_id=found.network_id)

    async def FirewallRemove(self, request: Any, context: Any) -> admin_pb2.FirewallRemoveResult:
        await self._firewall.remove(limit_s=answer_within(context))
        return admin_pb2.FirewallRemoveResult()

    async def FirewallEnable(self, request: Any, context: Any) -> admin_pb2.FirewallEnableResult:
        await within(context, self._firewall.enable(request.container_id))
        return admin_pb2.FirewallEnableResult()

    async def FirewallDisable(self, request: Any, context: Any) -> admin_pb2.FirewallDisableResult:
        await within(context, self._firewall.disable(request.container_id))
        return admin_pb2.FirewallDisableResult()

    async def FirewallBypass(self, request: Any, context: Any) -> admin_pb2.FirewallBypassResult:
        await within(context, self._firewall.bypass(request.container_id, request.timeout_seconds))
        return admin_pb2.FirewallBypassResult()

    async def FirewallAddRules(self, request: Any, context: Any) -> admin_pb2.FirewallAddRulesResult:
        rules = [rule_from_egress(message) for message in request.rules]
        statuses, live = await self._firewall.add_rules(rules, limit_s=answer_within(context))
        return admin_pb2.FirewallAddRulesResult(
            statuses=[int(status) for status in statuses],  # type: ignore[misc]
            stack_restarted=live,
        )

    async def FirewallRemoveRule(self, request: Any, context: Any) -> admin_pb2.FirewallRemoveRuleResult:
        if request.all and (request.dst or request.proto or request.port or request.path):
            raise InvalidInput("all: cannot be combined with dst, proto, port or path")
        status, live = await self._firewall.remove_rule(
            request.dst,
            request.proto,
            request.port,
            request.path,
            everything=request.all,
            limit_s=answer_within(context),
        )
        return admin_pb2.FirewallRemoveRuleResult(stack_restarted=live, status=int(status))  # type: ignore[arg-type]

    async def FirewallListRules(self, request: Any, context: Any) -> admin_pb2.FirewallListRulesResult:
        return admin_pb2.FirewallListRulesResult(rules=[egress_from_rule(r) for r in self._firewall.list_rules()])

    async def FirewallReload(self, request: Any, context: Any) -> admin_pb2.FirewallReloadResult:
        live = await self._firewall.reload(limit_s=answer_within(context, LONG_ANSWER_S))
        return admin_pb2.FirewallReloadResult(stack_restarted=live)

    async def FirewallStatus(self, request: Any, context: Any) -> admin_pb2.FirewallStatusResult:
        state = await self._firewall.status()
        return admin_pb2.FirewallStatusResult(
            running=state.running,
            envoy_health=state.proxy_healthy,
            coredns_health=state.dns_healthy,
            rule_count=state.rules,
            envoy_ip=state.addresses.proxy,
            coredns_ip=state.addresses.dns,
            network_id=state.addresses.network_id,
            cidr=state.addresses.cidr,
        )

    async def FirewallRotateCA(self, request: Any, context: Any) -> admin_pb2.FirewallRotateCAResult:
        return admin_pb2.FirewallRotateCAResult(
            stack_restarted=await self._firewall.rotate_ca(limit_s=answer_within(context))
        )

    async def FirewallSyncRoutes(self, request: Any, context: Any) -> admin_pb2.FirewallSyncRoutesResult:
        # What the caller thinks the routes are is not asked for: maps come from the compiled policy.
        applied = await self._firewall.sync_routes(limit_s=answer_within(context))
        return admin_pb2.FirewallSyncRoutesResult(applied=applied)

    async def FirewallResolveHostname(self, request: Any, context: Any) -> admin_pb2.FirewallResolveHostnameResult:
        if not request.hostname:
            raise InvalidInput("hostname: is empty")
        addresses = await self._firewall.resolve_hostname(request.hostname)
        return admin_pb2.FirewallResolveHostnameResult(addresses=addresses)

    async def ListAgents(self, request: Any, context: Any) -> admin_pb2.ListAgentsResult:
        rows = await asyncio.to_thread(self._agents.snapshot)
        return admin_pb2.ListAgentsResult(
            agents=[
                admin_pb2.Agent(
                    agent_name=row.agent,
                    container_id=row.container_id,
                    cert_thumbprint=row.thumbprint,
                    registered_at_unix=row.registered_at,
                    last_seen_unix=row.last_seen,
                    project=row.project,
                )
                for row in rows
            ]
        )

    async def GetSystemTime(self, request: Any, context: Any) -> admin_pb2.GetSystemTimeResult:
        return admin_pb2.GetSystemTimeResult(unix_nanos=self._wall_ns())

    async def WatchSOS(self, request: Any, context: Any) -> AsyncIterator[admin_pb2.SOS]:
        failure = await self._start.wait_outcome() if self._start is not None else ""
        if failure:
            yield admin_pb2.SOS(message=failure)
            await asyncio.sleep(SOS_KEPT_S)
