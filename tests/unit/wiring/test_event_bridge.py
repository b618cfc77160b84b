"""What is logged for operators is what watchers of events see, from any thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.topics import watch_topics
from clawker_cp.wiring.event_bridge import EventBridge, topic_of


@pytest.mark.parametrize(
    ("name", "topic"),
    [
        ("policy_applied", "policy"),
        ("bypass_started", "enforcement"),
        ("auth_denied", "auth"),
        ("envoy_unavailable", "health"),
        ("envoy_recovered", "health"),
        ("cp_ready", "engine"),
        ("library_log", None),
    ],
)
def test_names_have_their_topic(name: str, topic: str | None) -> None:
    """Events of the contract have a topic, chatter has none."""
    assert topic_of(name) == topic


async def test_a_line_of_another_thread_becomes_an_event() -> None:
    """Who it is about, and the other fields as text; a line nobody needs is none."""
    overseer = Overseer()
    bridge = EventBridge(overseer, asyncio.get_running_loop())
    line = {
        "event": "bypass_started",
        "time": "t",
        "level": "warning",
        "id": "abc",
        "agent": "agent:shop/dev",
        "seconds": 5,
    }
    async with watch_topics(overseer) as events:
        for one in ({"event": "library_log"}, line):
            thread = threading.Thread(target=bridge, args=(one,))
            thread.start()
            thread.join()
        async with asyncio.timeout(5):
            event = await anext(events)
    assert (event.topic, event.name, event.container_id) == ("enforcement", "bypass_started", "abc")
    assert (event.project, event.agent, dict(event.fields)) == ("shop", "dev", {"seconds": "5"})
    assert overseer.statistics().published == 1


def test_after_the_loop_lines_are_still_logged() -> None:
    """A closed loop is no error for whoever logs."""
    loop = asyncio.new_event_loop()
    loop.close()
    EventBridge(Overseer(), loop)({"event": "cp_ready"})
