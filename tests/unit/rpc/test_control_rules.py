"""Rules and verdicts over the wire: what is checked before the rule book is asked, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clawker_cp._proto.clawker.admin.v1 import admin_pb2
from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.agents.directory import resolve
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.errors import Conflict, InvalidInput, NotFound
from clawker_cp.firewall.changes import Applied
from clawker_cp.firewall.plan import Topology
from clawker_cp.firewall.rulebook import RuleBook
from clawker_cp.firewall.rules import Rule, normalise
from clawker_cp.rpc.control_rules import RuleRpcs, bypass_end_unix
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import DENIED, PROXY, Flow

NOW = 1_000_000.0
AGENT = control_pb2.AgentRef(project="p", agent="a")


class Context:
    """A call without a deadline."""

    def time_remaining(self) -> None:
        return None


class Policy:
    """Rules in memory."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = tuple(normalise(rule) for rule in rules)
        self.topology = Topology()
        self.readable = True
        self.version = 4

    def policy_of(self, key: str, /) -> int:
        return 9

    async def change_stored(self, change: Any, progress: Any = None) -> Applied:
        self.rules = tuple(change(self.rules))
        self.version += 1
        return Applied(self.version, live=True, apply_us=5)

    async def judge_stored(self, change: Any) -> list[Any]:
        change(self.rules)
        return []


class Finder:
    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    def find(self, container_id: str, project: str, agent: str) -> EnrolledAgent:
        return resolve(container_id, project, agent, self.roster)


class World:
    def __init__(self, directory: Path, *rules: Rule) -> None:
        self.roster = Roster()
        self.roster.put(EnrolledAgent("c" * 64, "p", "a", "198.51.100.7", 7, 9, clock_ns=lambda: 0))
        self.policy = Policy(*rules)
        self.flows = FlowLog(directory / "flows.jsonl")
        book = RuleBook(self.policy, wall=lambda: NOW)  # type: ignore[arg-type]
        self.rpcs = RuleRpcs(book, Finder(self.roster), self.flows, grant_max_s=100, wall=lambda: NOW)

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self.rpcs, method)(request, Context())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def grant(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "agent": AGENT, "egress": admin_pb2.EgressRule(dst="x.example"), "duration_seconds": 60, "reason": "why",
    }  # fmt: skip
    return control_pb2.GrantRequest(**{**fields, **changes})


async def test_rules_are_put_listed_and_deleted(world: World) -> None:
    """Outcomes, the version and what was removed are told; a dry run has no `applied`."""
    rules = [control_pb2.Rule(egress=admin_pb2.EgressRule(dst="x.example"), comment="c")]
    dry = await world.call("PutRules", control_pb2.PutRulesRequest(rules=rules, dry_run=True))
    assert not dry.HasField("applied") and dry.outcomes[0].status == admin_pb2.ADD_RULE_STATUS_ADDED
    done = await world.call("PutRules", control_pb2.PutRulesRequest(rules=rules))
    assert (done.applied.version, done.applied.live, done.applied.apply_us) == (5, True, 5)
    listed = await world.call("ListRules", control_pb2.ListRulesRequest())
    assert (listed.version, listed.rules[0].comment, listed.rules[0].source) == (5, "c", "control")
    gone = await world.call("DeleteRules", control_pb2.DeleteRulesRequest(ids=[listed.rules[0].id, "r-x"]))
    assert [rule.id for rule in gone.removed] == [listed.rules[0].id] and list(gone.not_found) == ["r-x"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"duration_seconds": 0}, "duration_seconds"),
        ({"duration_seconds": 101}, "duration_seconds"),
        ({"reason": " "}, "reason"),
        ({"reason": "x" * 201}, "reason"),
        ({"egress": admin_pb2.EgressRule(dst="x.example", action="deny")}, "egress.action"),
        ({"agent": control_pb2.AgentRef()}, "agent"),
    ],
)
async def test_a_grant_that_makes_no_sense_names_the_field(world: World, changes: dict[str, Any], field: str) -> None:
    """Time, reason, action and agent each have their own refusal; nothing is stored."""
    with pytest.raises(InvalidInput, match=field):
        await world.call("Grant", grant(**changes))
    assert world.policy.rules == ()


async def test_a_grant_is_an_expiring_rule_of_that_agent(world: World) -> None:
    """Scope, end, comment and source are set by the server."""
    done = await world.call("Grant", grant(tls=control_pb2.TLS_MODE_PASSTHROUGH))
    rule = done.rule
    assert (rule.scope, rule.expires_at_unix, rule.comment, rule.source) == ("agent:p/a", int(NOW) + 60, "why", "grant")
    assert rule.tls == control_pb2.TLS_MODE_PASSTHROUGH and done.applied.live


async def test_nobody_and_the_quarantined_are_granted_nothing(world: World) -> None:
    """Each with its code."""
    with pytest.raises(NotFound) as unknown:
        await world.call("Grant", grant(agent=control_pb2.AgentRef(project="p", agent="b")))
    assert unknown.value.code == "AGENT_NOT_FOUND"
    world.roster.update("c" * 64, quarantined=True)
    with pytest.raises(Conflict) as refused:
        await world.call("Grant", grant())
    assert refused.value.code == "AGENT_QUARANTINED"


async def test_effective_rules_tell_quarantine_and_bypass(tmp_path: Path) -> None:
    """Beside the rules that hold, whether they count at all right now."""
    world = World(tmp_path, Rule("x.example"), Rule("y.example", scope="agent:p/b"))
    world.roster.update("c" * 64, quarantined=True, bypass_until_ns=30_000_000_000)
    answer = await world.call("GetEffectiveRules", control_pb2.GetEffectiveRulesRequest(agent=AGENT))
    assert [one.rule.egress.dst for one in answer.rules] == ["x.example"]
    assert (answer.quarantined, answer.bypass_until_unix, answer.policy) == (True, int(NOW) + 30, 9)
    agent = world.roster.by_id("c" * 64)
    assert agent is not None and bypass_end_unix(agent, NOW) == int(NOW) + 30


async def test_a_check_without_an_agent_asks_the_global_rules(tmp_path: Path) -> None:
    """With one, its own count as well."""
    world = World(tmp_path, Rule("x.example"), Rule("y.example", scope="agent:p/a"))

    async def allowed(host: str, agent: Any = None) -> bool:
        return bool((await world.call("Check", control_pb2.CheckRequest(host=host, agent=agent))).verdict.allowed)

    assert await allowed("x.example") and not await allowed("y.example")
    assert await allowed("y.example", AGENT)
    with pytest.raises(InvalidInput, match="host"):
        await allowed("")


async def test_an_event_is_explained_with_its_rule_and_the_present_verdict(tmp_path: Path) -> None:
    """From memory by id; an unknown one is not found."""
    world = World(tmp_path, Rule("x.example"))
    rule = world.policy.rules[0]
    world.flows.add([
        Flow(event_id="p-1-2", project="p", agent="a", layer=PROXY, verdict=DENIED, reason="path_denied",
             rule_id=rule.id, proto="https", host="x.example", port=443, method="GET", path="/"),
        Flow(event_id="k-1-1", project="p", agent="a", proto="other", address="203.0.113.1"),
        Flow(event_id="p-1-3", project="p", agent="a", proto="https", host="no name!", port=443),
    ])  # fmt: skip
    answer = await world.call("Explain", control_pb2.ExplainRequest(event_id="p-1-2"))
    assert (answer.flow.event_id, answer.rule.id, answer.now.allowed) == ("p-1-2", rule.id, True)
    for event_id in ("k-1-1", "p-1-3"):  # no rule speaks of a raw packet, nor of what is no name
        assert not (await world.call("Explain", control_pb2.ExplainRequest(event_id=event_id))).HasField("now")
    with pytest.raises(NotFound, match="event_id"):
        await world.call("Explain", control_pb2.ExplainRequest(event_id="p-9-9"))
    world.flows.close()
