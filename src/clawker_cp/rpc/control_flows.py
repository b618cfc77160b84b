"""
ControlService, the part that streams: flow records and events.

A watcher never delays a decision: its buffer is bounded, what it does not read in time is counted and
told. At most 32 watchers of each kind.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.errors import CapacityExceeded, InvalidInput
from clawker_cp.rpc.control_rules import AgentFinder
from clawker_cp.rpc.flow_messages import event_message, filter_from, flow_message, loss_message
from clawker_cp.rpc.limits import WATCHERS
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.topics import watch_topics
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import Flow, FlowFilter

MAX_LAST = 10_000


class FlowRpcs:
    """
    The RPCs over the flow log and the event bus.
    """

    def __init__(self, flows: FlowLog, events: Overseer, agents: AgentFinder) -> None:
        self._flows = flows
        self._events = events
        self._finder = agents
        self._watching: dict[str, int] = {}

    async def WatchFlows(self, request: Any, context: Any) -> AsyncGenerator[control_pb2.WatchFlowsResult, None]:
        if request.last > MAX_LAST:
            raise InvalidInput(f"last: {request.last} is more than {MAX_LAST}")
        if request.since_unix_ns < 0:
            raise InvalidInput("since_unix_ns: is negative")
        wanted = self._filter(request.filter)
        with self._room("WatchFlows"):
            async with self._flows.subscribe(wanted=wanted) as subscription:
                # Subscribed before the replay is read: a record is in one of both, never in neither.
                earlier = self._replay(wanted, request.last, request.since_unix_ns)
                seen = {flow.event_id for flow in earlier[-MAX_LAST:]}
                for flow in earlier:
                    yield control_pb2.WatchFlowsResult(flow=flow_message(flow))
                while request.follow:
                    for flow in await subscription.next_batch():
                        if flow.event_id not in seen:
                            yield control_pb2.WatchFlowsResult(flow=flow_message(flow))
                    seen.clear()
                    for loss in subscription.losses():
                        yield control_pb2.WatchFlowsResult(loss=loss_message(loss))

    async def WatchEvents(self, request: Any, context: Any) -> AsyncGenerator[control_pb2.Event, None]:
        with self._room("WatchEvents"):
            async with watch_topics(self._events, request.topics) as events:
                # The caller learns that it is subscribed before the first event.
                await context.send_initial_metadata(())
                async for event in events:
                    yield event_message(event)

    def _filter(self, message: Any) -> FlowFilter:
        ids = [self._finder.find(ref.container_id, ref.project, ref.agent).id for ref in message.agents]
        return filter_from(message, ids)

    def _replay(self, wanted: FlowFilter, last: int, since_unix_ns: int) -> list[Flow]:
        if not last and not since_unix_ns:
            return []
        found = [flow for flow in self._flows.recent() if flow.time_unix_ns >= since_unix_ns and wanted.admits(flow)]
        return found[-last:] if last else found

    @contextmanager
    def _room(self, kind: str) -> Iterator[None]:
        if self._watching.get(kind, 0) >= WATCHERS:
            raise CapacityExceeded(f"{WATCHERS} callers follow {kind} already", limit="watchers")
        self._watching[kind] = self._watching.get(kind, 0) + 1
        try:
            yield
        finally:
            self._watching[kind] -= 1
