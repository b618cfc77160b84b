"""
ControlService, the part about rules and verdicts: put, delete, list, effective, grant, check, explain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.agents.roster import EnrolledAgent
from clawker_cp.errors import Conflict, InvalidInput, NotFound
from clawker_cp.firewall.check import Request
from clawker_cp.firewall.rulebook import Outcome, RuleBook
from clawker_cp.firewall.rules import GLOBAL, Rule
from clawker_cp.rpc.flow_messages import flow_message
from clawker_cp.rpc.limits import answer_within
from clawker_cp.rpc.rule_messages import (
    applied_message,
    control_from_rule,
    effective_message,
    rule_from_control,
    verdict_message,
)
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import Flow

MAX_REASON = 200
_CHECKABLE = frozenset({"https", "http", "ws", "wss", "tcp", "udp", "ssh"})


class AgentFinder(Protocol):
    """From an `AgentRef` to the one running agent."""

    def find(self, container_id: str, project: str, agent: str) -> EnrolledAgent:
        """Raises `NotFound` (`AGENT_NOT_FOUND`) or `InvalidInput`."""
        ...


class RuleRpcs:
    """
    The RPCs; `rules`, `agents` and `flows` do the work.
    """

    def __init__(
        self,
        rules: RuleBook,
        agents: AgentFinder,
        flows: FlowLog,
        *,
        grant_max_s: int = 86400,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._rules = rules
        self._agents = agents
        self._flow_log = flows
        self._grant_max_s = grant_max_s
        self._wall = wall

    async def PutRules(self, request: Any, context: Any) -> control_pb2.PutRulesResult:
        rules = [rule_from_control(message, index) for index, message in enumerate(request.rules)]
        if request.dry_run:
            judged = await self._rules.judge(rules, limit_s=answer_within(context))
            return control_pb2.PutRulesResult(outcomes=[_outcome(one) for one in judged])
        outcomes, applied = await self._rules.put(rules, source="control", limit_s=answer_within(context))
        return control_pb2.PutRulesResult(
            outcomes=[_outcome(one) for one in outcomes], applied=applied_message(applied)
        )

    async def DeleteRules(self, request: Any, context: Any) -> control_pb2.DeleteRulesResult:
        removed, missing, applied = await self._rules.delete(
            list(request.ids), request.scope, dry_run=request.dry_run, limit_s=answer_within(context)
        )
        return control_pb2.DeleteRulesResult(
            removed=[control_from_rule(rule) for rule in removed],
            not_found=missing,
            applied=applied_message(applied),
        )

    async def ListRules(self, request: Any, context: Any) -> control_pb2.ListRulesResult:
        return control_pb2.ListRulesResult(
            rules=[control_from_rule(rule, hit) for rule, hit in self._rules.in_scope(request.scope)],
            version=self._rules.version,
        )

    async def GetEffectiveRules(self, request: Any, context: Any) -> control_pb2.GetEffectiveRulesResult:
        agent = self._find(request.agent)
        return control_pb2.GetEffectiveRulesResult(
            policy=agent.policy,
            version=self._rules.version,
            rules=[effective_message(one) for one in self._rules.effective(agent.key)],
            quarantined=agent.quarantined,
            bypass_until_unix=bypass_end_unix(agent, self._wall()),
        )

    async def Grant(self, request: Any, context: Any) -> control_pb2.GrantResult:
        agent = self._find(request.agent)
        if not 1 <= request.duration_seconds <= self._grant_max_s:
            raise InvalidInput(f"duration_seconds: {request.duration_seconds} is not between 1 and {self._grant_max_s}")
        if not request.reason.strip() or len(request.reason) > MAX_REASON:
            raise InvalidInput(f"reason: say why, in at most {MAX_REASON} characters")
        if request.egress.action.strip().lower() not in {"", "allow"}:
            raise InvalidInput("egress.action: a grant allows; write a rule to deny")
        if agent.quarantined:
            raise Conflict(
                f"agent {agent.key.removeprefix('agent:')} is quarantined; release it first", code="AGENT_QUARANTINED"
            )
        message = control_pb2.Rule(
            scope=agent.key,
            egress=request.egress,
            tls=request.tls,
            comment=request.reason,
            expires_at_unix=int(self._wall()) + request.duration_seconds,
        )
        rule = rule_from_control(message, 0)
        outcomes, applied = await self._rules.put([rule], source="grant", limit_s=answer_within(context))
        granted = self._by_id(outcomes[0].rule_id, expiring=True)
        return control_pb2.GrantResult(
            rule=control_from_rule(granted) if granted is not None else message, applied=applied_message(applied)
        )

    async def Check(self, request: Any, context: Any) -> control_pb2.CheckResult:
        ref = request.agent
        key = self._find(ref).key if ref.container_id or ref.agent or ref.project else GLOBAL
        return control_pb2.CheckResult(
            verdict=self._judge(
                key, Request(request.host, request.proto or "https", request.port, request.method, request.path)
            )
        )

    async def Explain(self, request: Any, context: Any) -> control_pb2.ExplainResult:
        flow = await self._flow_log.search(request.event_id, limit_s=answer_within(context))
        if flow is None:
            raise NotFound(f"event_id: {request.event_id!r} is unknown, or too old to be kept")
        rule = self._by_id(flow.rule_id) if flow.rule_id else None
        return control_pb2.ExplainResult(
            flow=flow_message(flow),
            rule=control_from_rule(rule) if rule is not None else None,
            now=self._verdict_now(flow),
        )

    def _find(self, ref: Any) -> EnrolledAgent:
        return self._agents.find(ref.container_id, ref.project, ref.agent)

    def _judge(self, key: str, request: Request) -> control_pb2.Verdict:
        verdict = self._rules.check(key, request)
        return verdict_message(verdict, policy=self._rules.policy_of(key), version=self._rules.version)

    def _verdict_now(self, flow: Flow) -> control_pb2.Verdict | None:
        """What the rules would say of the same request now; None for what no rule speaks of (a raw packet)."""
        proto = {"quic": "udp", "dns": "https"}.get(flow.proto, flow.proto)
        target = flow.host or flow.address
        if proto not in _CHECKABLE or not target or not flow.agent:
            return None
        key = f"agent:{flow.project}/{flow.agent}"
        try:
            return self._judge(key, Request(target, proto, flow.port, flow.method, flow.path))
        except InvalidInput:
            return None

    def _by_id(self, rule_id: str, *, expiring: bool = False) -> Rule | None:
        found = [rule for rule, _ in self._rules.in_scope() if rule.id == rule_id]
        found.sort(key=lambda rule: bool(rule.expires_at), reverse=expiring)
        return found[0] if found else None


def bypass_end_unix(agent: EnrolledAgent, wall: float) -> int:
    """
    When an agent's bypass ends, in Unix seconds; 0 = it has none.
    """
    if not agent.bypassed:
        return 0
    return int(wall + (agent.bypass_until_ns - agent.clock_ns()) / 1e9)


def _outcome(outcome: Outcome) -> control_pb2.RuleOutcome:
    message = control_pb2.RuleOutcome(id=outcome.rule_id, problem=outcome.problem)
    if outcome.status is not None:
        message.status = outcome.status  # type: ignore[assignment]
    return message
