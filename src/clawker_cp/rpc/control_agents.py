"""
ControlService, the part about the server itself, its agents and their tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.agents.roster import EnrolledAgent
from clawker_cp.engines.base import HostFeature
from clawker_cp.errors import InvalidInput
from clawker_cp.rpc.control_rules import AgentFinder, bypass_end_unix
from clawker_cp.rpc.limits import within
from clawker_cp.runtime.health import Component

MAX_REASON = 200


@dataclass(frozen=True, slots=True)
class Status:
    """Answer of `GetStatus`, gathered by the application."""

    version: str
    ready: bool
    started_at_unix: int
    policy_version: int
    policies: int
    rules: int
    engine: str
    stack: str
    agents: Sequence[EnrolledAgent] = ()
    components: Sequence[Component] = ()
    host: Sequence[HostFeature] = field(default=())


@dataclass(frozen=True, slots=True)
class Session:
    """
    One agent as `ListSessions` shows it. What a dialer would know stays empty for an agent that is never dialled (R32).
    """

    agent: EnrolledAgent
    engine: str
    running: bool
    enrolled: bool
    registered: bool = False
    thumbprint: str = ""
    last_seen_unix: int = 0
    quarantine_reason: str = ""
    exposures: Sequence[str] = ()


class AgentVerbs(Protocol):
    """What operators do to agents: `wiring.agent_control` and the session list."""

    async def sessions(self, *, everything: bool) -> Sequence[Session]: ...
    async def quarantine(self, agent: EnrolledAgent, reason: str) -> int: ...
    async def release(self, agent: EnrolledAgent) -> None: ...


class TokenRevoker(Protocol):
    """Revokes by one of four selectors; returns how many entries that dropped."""

    async def revoke(
        self, *, token: str = "", token_sha256: str = "", client_id: str = "", everything: bool = False
    ) -> int: ...


class AgentRpcs:
    """
    The RPCs; `status` gathers what `GetStatus` tells.
    """

    def __init__(
        self,
        status: Callable[[], Status],
        verbs: AgentVerbs,
        finder: AgentFinder,
        tokens: TokenRevoker,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._status = status
        self._verbs = verbs
        self._running = finder
        self._tokens = tokens
        self._clock = wall

    async def GetStatus(self, request: Any, context: Any) -> control_pb2.GetStatusResult:
        status = self._status()
        return control_pb2.GetStatusResult(
            version=status.version,
            ready=status.ready,
            started_at_unix=status.started_at_unix,
            policy_version=status.policy_version,
            policies=status.policies,
            rules=status.rules,
            agents_enrolled=len(status.agents),
            agents_quarantined=sum(agent.quarantined for agent in status.agents),
            agents_bypassed=sum(agent.bypassed for agent in status.agents),
            engine=status.engine,
            stack=status.stack,
            components=[component_message(one) for one in status.components],
            host=[
                control_pb2.HostFeature(name=row.name, present=row.present, need=row.need, cost=row.cost)
                for row in status.host
            ],
        )

    async def ListSessions(self, request: Any, context: Any) -> control_pb2.ListSessionsResult:
        sessions = await self._verbs.sessions(everything=request.all)
        ordered = sorted(sessions, key=lambda one: (one.agent.project, one.agent.agent, one.agent.id))
        return control_pb2.ListSessionsResult(sessions=[self._session(one) for one in ordered])

    async def Quarantine(self, request: Any, context: Any) -> control_pb2.QuarantineResult:
        if not request.reason.strip() or len(request.reason) > MAX_REASON:
            raise InvalidInput(f"reason: say why, in at most {MAX_REASON} characters")
        agent = self._find_running(request.agent)
        cut = await within(context, self._verbs.quarantine(agent, request.reason.strip()))
        return control_pb2.QuarantineResult(connections_cut=cut)

    async def Release(self, request: Any, context: Any) -> control_pb2.ReleaseResult:
        await within(context, self._verbs.release(self._find_running(request.agent)))
        return control_pb2.ReleaseResult()

    async def RevokeToken(self, request: Any, context: Any) -> control_pb2.RevokeTokenResult:
        which = request.WhichOneof("selector")
        if which is None or not getattr(request, which):
            raise InvalidInput("selector: give token, token_sha256, client_id or all")
        chosen: dict[str, Any] = {"everything" if which == "all" else which: getattr(request, which)}
        return control_pb2.RevokeTokenResult(revoked=await self._tokens.revoke(**chosen))

    def _find_running(self, ref: Any) -> EnrolledAgent:
        return self._running.find(ref.container_id, ref.project, ref.agent)

    def _session(self, session: Session) -> control_pb2.SessionInfo:
        agent = session.agent
        return control_pb2.SessionInfo(
            container_id=agent.id,
            project=agent.project,
            agent=agent.agent,
            engine=session.engine,
            running=session.running,
            address=agent.address,
            registered=session.registered,
            cert_thumbprint=session.thumbprint,
            last_seen_unix=session.last_seen_unix,
            cmd_running=session.running,
            policy=agent.policy,
            enrolled=session.enrolled,
            quarantined=agent.quarantined,
            quarantine_reason=session.quarantine_reason,
            bypass_until_unix=bypass_end_unix(agent, self._clock()),
            exposures=session.exposures,
        )


def component_message(component: Component) -> control_pb2.Component:
    """
    One entry of `GetStatus`.
    """
    message = control_pb2.Component(
        name=component.name,
        implementation=component.implementation,
        version=component.version,
        detail=component.detail,
        since_unix=component.since_unix,
        critical=component.critical,
        restarts=component.restarts,
    )
    message.health = int(component.health)  # type: ignore[assignment]
    return message
