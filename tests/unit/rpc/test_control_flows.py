"""Streams: what was before and what comes, once each; bounded watchers; losses told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.agents.roster import EnrolledAgent
from clawker_cp.errors import CapacityExceeded, InvalidInput
from clawker_cp.rpc import control_flows
from clawker_cp.rpc.control_flows import FlowRpcs
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.topics import Event
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import ALLOWED, DENIED, DNS, Flow


class Finder:
    def find(self, container_id: str, project: str, agent: str) -> EnrolledAgent:
        return EnrolledAgent("c1", project, agent, "198.51.100.7", 1, 1)


class Context:
    def __init__(self) -> None:
        self.begun = asyncio.Event()

    async def send_initial_metadata(self, _metadata: Any) -> None:
        self.begun.set()


class World:
    def __init__(self, directory: Path) -> None:
        self.flows = FlowLog(directory / "flows.jsonl")
        self.events = Overseer()
        self.rpcs = FlowRpcs(self.flows, self.events, Finder())

    def record(self, number: int, container: str = "c1", verdict: str = DENIED) -> Flow:
        flow = Flow(event_id=f"d-1-{number}", time_unix_ns=number, container_id=container, layer=DNS, verdict=verdict)
        self.flows.add([flow])
        return flow

    async def replay(self, **fields: Any) -> list[str]:
        request = control_pb2.WatchFlowsRequest(**fields)
        return [item.flow.event_id async for item in self.rpcs.WatchFlows(request, None)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_the_last_or_those_since_are_replayed_and_then_it_ends(world: World) -> None:
    """Without `follow` the stream ends; filters count for the replay."""
    for number in range(1, 6):
        world.record(number, verdict=ALLOWED if number == 3 else DENIED)
    assert await world.replay(last=2) == ["d-1-4", "d-1-5"]
    assert await world.replay(since_unix_ns=4) == ["d-1-4", "d-1-5"]
    assert await world.replay() == []
    denied = control_pb2.FlowFilter(verdicts=[control_pb2.FLOW_VERDICT_ALLOWED])
    assert await world.replay(last=10, filter=denied) == ["d-1-3"]
    theirs = control_pb2.FlowFilter(agents=[control_pb2.AgentRef(project="p", agent="a")])
    world.record(6, container="c2")
    assert len(await world.replay(last=10, filter=theirs)) == 5


async def test_following_goes_on_where_the_replay_ended(world: World) -> None:
    """No record twice, none left out."""
    world.record(1)
    stream = world.rpcs.WatchFlows(control_pb2.WatchFlowsRequest(last=5, follow=True), None)
    async with asyncio.timeout(5):
        seen = [(await anext(stream)).flow.event_id]
        for number in (2, 3):
            world.record(number)
            seen.append((await anext(stream)).flow.event_id)
    await stream.aclose()
    assert seen == ["d-1-1", "d-1-2", "d-1-3"]


async def test_a_slow_watcher_is_told_what_it_lost(world: World) -> None:
    """The oldest go, their number is said, and what is left follows."""
    stream = world.rpcs.WatchFlows(control_pb2.WatchFlowsRequest(follow=True), None)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    world.record(0)
    await first
    world.flows.add([Flow(event_id=f"d-2-{number}", container_id="c1") for number in range(5000)])
    async with asyncio.timeout(10):
        loss, following = (await anext(stream)).loss, (await anext(stream)).flow
    await stream.aclose()
    assert (loss.container_id, loss.where, loss.count) == ("c1", "subscriber", 904)
    assert following.event_id == "d-2-904"


@pytest.mark.parametrize(("fields", "named"), [({"last": 10_001}, "last"), ({"since_unix_ns": -1}, "since_unix_ns")])
async def test_bounds_are_named(world: World, fields: dict[str, Any], named: str) -> None:
    """Too long a replay, or a time before time, is refused."""
    with pytest.raises(InvalidInput, match=named):
        await world.replay(**fields)


async def test_watchers_are_bounded_and_places_come_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound counts those that follow now."""
    monkeypatch.setattr(control_flows, "WATCHERS", 1)
    stream = world.rpcs.WatchFlows(control_pb2.WatchFlowsRequest(follow=True), None)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    with pytest.raises(CapacityExceeded, match="WatchFlows"):
        await world.replay(last=1)
    waiting.cancel()
    await asyncio.wait([waiting])
    await stream.aclose()
    assert await world.replay(last=1) == []


async def test_events_are_followed_by_topic(world: World) -> None:
    """The subscription stands before the first answer, and an unknown topic is refused."""
    context = Context()
    stream = world.rpcs.WatchEvents(control_pb2.WatchEventsRequest(topics=["policy"]), context)
    first = asyncio.ensure_future(anext(stream))
    async with asyncio.timeout(5):
        await context.begun.wait()
        world.events.publish(Event(1, "agent", "enrolled"))
        world.events.publish(Event(2, "policy", "policy_applied", fields={"version": "7"}))
        event = await first
    await stream.aclose()
    assert (event.name, dict(event.fields)) == ("policy_applied", {"version": "7"})
    with pytest.raises(InvalidInput, match="weather"):
        await anext(world.rpcs.WatchEvents(control_pb2.WatchEventsRequest(topics=["weather"]), context))
