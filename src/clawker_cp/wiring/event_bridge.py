"""
From log lines that operators may rely on (contract 10.4) to events of the bus, for `WatchEvents`.

One source for both: what is logged is what watchers see. Never blocks, never raises (I12).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.topics import Event, Topic

_ENFORCEMENT = (
    "enrolled", "enroll_failed", "withdrawn", "bypass_started", "bypass_ended", "quarantined", "released",
    "connections_cut", "firewall_up", "firewall_down", "firewall_disable_refused", "firewall_disable_ignored",
    "pins_adopted", "pins_replaced", "links_restored", "drain_list_failed",
)  # fmt: skip
_POLICY = (
    "policy_applied", "policy_refused", "policy_behind", "rule_added", "rule_modified", "rule_removed", "rule_expired",
    "rule_skipped", "rules_unreadable", "ca_rotated", "dns_budget_warning", "dns_budget_exceeded",
    "firewall_rules_wiped",
)  # fmt: skip
_AUTH = ("token_refused", "token_revoked", "auth_denied", "pki_expiring", "pki_renewed", "pki_inconsistent")
_AGENT = ("agents_adopted", "agents_adopted_unclaimed", "sandbox_gone", "agent_exposed", "agent_registered")
_ENGINE = ("cp_ready", "drain_started", "drain_done", "engines_sandbox_adopted")
TOPICS: Mapping[str, Topic] = {
    **dict.fromkeys(_ENFORCEMENT, "enforcement"),
    **dict.fromkeys(_POLICY, "policy"),
    **dict.fromkeys(_AUTH, "auth"),
    **dict.fromkeys(_AGENT, "agent"),
    **dict.fromkeys(_ENGINE, "engine"),
    "subscriber_stuck": "health",
}
_LEFT_OUT = frozenset({"event", "time", "level", "exception", "id", "agent"})
MAX_TEXT = 512


def topic_of(name: str) -> Topic | None:
    """
    The topic of a log event, None for one that is not for watchers.
    """
    if name.endswith(("_unavailable", "_recovered")):
        return "health"
    return TOPICS.get(name)


class EventBridge:
    """
    Publishes on `overseer`, on its loop, whatever thread a line was logged in.
    """

    def __init__(self, overseer: Overseer, loop: asyncio.AbstractEventLoop, clock: Clock = SYSTEM_CLOCK) -> None:
        self._overseer = overseer
        self._loop = loop
        self._clock = clock

    def __call__(self, line: Mapping[str, Any]) -> None:
        """
        Take one redacted line of the log.
        """
        name = str(line.get("event", ""))
        topic = topic_of(name)
        if topic is None:
            return
        key = str(line.get("agent", "")).removeprefix("agent:")
        project, slash, agent = key.partition("/")
        fields = {
            field: str(value)[:MAX_TEXT]
            for field, value in line.items()
            if field not in _LEFT_OUT and value is not None
        }
        event = Event(
            time_unix_ns=self._clock.wall_ns(),
            topic=topic,
            name=name,
            container_id=str(line.get("id", "")),
            project=project if slash else "",
            agent=agent,
            fields=fields,
        )
        try:
            self._loop.call_soon_threadsafe(self._overseer.publish, event)
        except RuntimeError:
            return  # the loop is closed: nobody watches any more
