"""Status, sessions, quarantine and tokens over the wire."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.agents.roster import EnrolledAgent
from clawker_cp.engines.base import HostFeature
from clawker_cp.errors import InvalidInput
from clawker_cp.rpc.control_agents import AgentRpcs, Session, Status
from clawker_cp.runtime.health import Component, Health

# A call whose caller waits for ever.
CALL = SimpleNamespace(time_remaining=lambda: None)


def agent(name: str, project: str = "p", **more: Any) -> EnrolledAgent:
    return EnrolledAgent(name * 64, project, name, "198.51.100.7", 1, 3, clock_ns=lambda: 0, **more)


class Agents:
    """Verbs, finder and revoker in one."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.listed: Sequence[Session] = ()

    def find(self, container_id: str, project: str, name: str) -> EnrolledAgent:
        return agent(name, project)

    async def sessions(self, *, everything: bool) -> Sequence[Session]:
        self.told.append(everything)
        return self.listed

    async def quarantine(self, one: EnrolledAgent, reason: str) -> int:
        self.told.append((one.agent, reason))
        return 4

    async def release(self, one: EnrolledAgent) -> None:
        self.told.append(one.agent)

    async def revoke(self, **selector: Any) -> int:
        self.told.append(selector)
        return 2


STATUS = Status(
    "1.2", True, 5, 7, 2, 30, "host", "embedded",
    agents=(agent("a"), agent("b", quarantined=True), agent("c", bypass_until_ns=10)),
    components=(Component("dns", "gate", "v", Health.DEGRADED, "slow", 9, critical=True, restarts=3),),
    host=(HostFeature("nft", False, required=True, detail="d", need="nftables", cost="no ring"),),
)  # fmt: skip


@pytest.fixture
def agents() -> Agents:
    return Agents()


def rpcs(agents: Agents) -> AgentRpcs:
    return AgentRpcs(lambda: STATUS, agents, agents, agents, wall=lambda: 100.0)


async def test_status_goes_out_whole(agents: Agents) -> None:
    """Counts of agents by state, components with health, what the host lacks."""
    answer = await rpcs(agents).GetStatus(control_pb2.GetStatusRequest(), None)
    assert (answer.version, answer.ready, answer.started_at_unix, answer.policy_version) == ("1.2", True, 5, 7)
    assert (answer.policies, answer.rules, answer.engine, answer.stack) == (2, 30, "host", "embedded")
    assert (answer.agents_enrolled, answer.agents_quarantined, answer.agents_bypassed) == (3, 1, 1)
    assert answer.components[0] == control_pb2.Component(
        name="dns", implementation="gate", version="v", health=control_pb2.HEALTH_DEGRADED, detail="slow", since_unix=9,
        critical=True, restarts=3,
    )  # fmt: skip
    assert answer.host[0] == control_pb2.HostFeature(name="nft", need="nftables", cost="no ring")


async def test_sessions_are_ordered_and_complete(agents: Agents) -> None:
    """By project and agent; what a dialer would know stays empty."""
    agents.listed = [
        Session(agent("b"), "host", running=True, enrolled=True, quarantine_reason="odd", exposures=["privileged"]),
        Session(agent("z", "a"), "host", running=False, enrolled=False, registered=True, thumbprint="ab"),
        Session(agent("a", bypass_until_ns=50_000_000_000), "host", running=True, enrolled=True),
    ]
    answer = await rpcs(agents).ListSessions(control_pb2.ListSessionsRequest(all=True), None)
    assert [(one.project, one.agent) for one in answer.sessions] == [("a", "z"), ("p", "a"), ("p", "b")]
    assert agents.told == [True]
    assert answer.sessions[1].bypass_until_unix == 150 and answer.sessions[1].policy == 3
    assert answer.sessions[2].quarantine_reason == "odd" and list(answer.sessions[2].exposures) == ["privileged"]
    assert answer.sessions[0].cert_thumbprint == "ab" and answer.sessions[0].state == 0


async def test_a_quarantine_needs_a_reason(agents: Agents) -> None:
    """A bounded one; the number of cut connections is told."""
    ref = control_pb2.AgentRef(project="p", agent="a")
    for reason in ("", "  ", "x" * 201):
        with pytest.raises(InvalidInput, match="reason"):
            await rpcs(agents).Quarantine(control_pb2.QuarantineRequest(agent=ref, reason=reason), CALL)
    answer = await rpcs(agents).Quarantine(control_pb2.QuarantineRequest(agent=ref, reason=" odd "), CALL)
    await rpcs(agents).Release(control_pb2.ReleaseRequest(agent=ref), CALL)
    assert answer.connections_cut == 4 and agents.told == [("a", "odd"), "a"]


@pytest.mark.parametrize(
    ("request_", "selector"),
    [
        (control_pb2.RevokeTokenRequest(token="t"), {"token": "t"}),
        (control_pb2.RevokeTokenRequest(token_sha256="ab"), {"token_sha256": "ab"}),
        (control_pb2.RevokeTokenRequest(client_id="c"), {"client_id": "c"}),
        (control_pb2.RevokeTokenRequest(all=True), {"everything": True}),
    ],
)
async def test_tokens_are_revoked_by_one_selector(agents: Agents, request_: Any, selector: dict[str, Any]) -> None:
    """Each of the four reaches the revoker under its own name."""
    assert (await rpcs(agents).RevokeToken(request_, None)).revoked == 2
    assert agents.told == [selector]


@pytest.mark.parametrize(
    "request_", [control_pb2.RevokeTokenRequest(), control_pb2.RevokeTokenRequest(token=""),
                 control_pb2.RevokeTokenRequest(all=False)]
)  # fmt: skip
async def test_an_empty_selector_revokes_nothing(agents: Agents, request_: Any) -> None:
    """Never "all" by accident."""
    with pytest.raises(InvalidInput, match="selector"):
        await rpcs(agents).RevokeToken(request_, None)
    assert agents.told == []
