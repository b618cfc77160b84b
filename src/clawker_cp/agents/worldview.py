"""
What is where, right now: containers, agents and sessions as the bus told of them.

Changed by published messages only (`runtime.overseer` folds them in), so every reader sees one history.
It shows and finds; what identity rests on is asked from the engine (I9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from clawker_cp.agents.world_messages import (
    AgentChanged,
    AgentEntry,
    AgentForgotten,
    ContainerChange,
    ContainerConnected,
    ContainerDestroyed,
    ContainerDied,
    ContainerDisconnected,
    ContainerEntry,
    ContainerPaused,
    ContainerRenamed,
    ContainerSeen,
    ContainersListed,
    SessionChanged,
    SessionEnded,
    SessionEntry,
)
from clawker_cp.runtime.tables import Table

# Containers, stopped ones too: four times `firewall.max_agents`.
WORLD_ENTRIES = 16_384


@dataclass(frozen=True, slots=True)
class Snapshot:
    """
    The world at one version; never changes.
    """

    version: int
    containers: Mapping[str, ContainerEntry]
    agents: Mapping[str, AgentEntry]
    sessions: Mapping[str, SessionEntry]


class Worldview:
    """
    A view for `Overseer.attach`. Look-ups are synchronous and cost the same for any number of containers.

    `version` grows with every message that changed something, and with nothing else. What cannot be has an answer:

    - a container that was destroyed and is seen again has a new life, without agent and session;
    - a change of a container that is not known is ignored, and so is one older than what is known of it;
    - an agent needs a container that is known, a session one that runs; without, they are ignored;
    - a container's death ends its session, its end its agent too.

    Ignored messages are counted; `ContainersListed` puts right what a lost one left wrong. At most
    `capacity` containers; more are refused and counted.
    """

    kinds = (
        ContainerSeen,
        ContainerChange,
        ContainersListed,
        AgentChanged,
        AgentForgotten,
        SessionChanged,
        SessionEnded,
    )

    def __init__(self, capacity: int = WORLD_ENTRIES) -> None:
        self._containers: Table[ContainerEntry] = Table(capacity)
        self._agents: Table[AgentEntry] = Table(capacity)
        self._sessions: Table[SessionEntry] = Table(capacity)
        self._times_ns: dict[str, int] = {}  # of the last thing known of each container
        self._version = 0
        self._ignored = 0
        self._snapshot: Snapshot | None = None
        self._folds: dict[type, Callable[[Any], bool]] = {
            ContainerSeen: self._see,
            ContainersListed: self._list,
            AgentChanged: self._set_agent,
            AgentForgotten: lambda message: self._agents.remove(message.id),
            SessionChanged: self._set_session,
            SessionEnded: lambda message: self._sessions.remove(message.id),
        }

    @property
    def version(self) -> int:
        """How many messages have changed something."""
        return self._version

    def apply(self, message: Any) -> None:
        """
        Take one message of `kinds`. Called by the bus, the one writer.
        """
        fold = self._folds.get(type(message), self._change)
        if fold(message):
            self._version += 1
            self._snapshot = None

    def container(self, container_id: str) -> ContainerEntry | None:
        """
        A container by its full id, running or not.
        """
        return self._containers.get(container_id)

    def agent(self, container_id: str) -> AgentEntry | None:
        """
        What this server holds of the agent in a container.
        """
        return self._agents.get(container_id)

    def session(self, container_id: str) -> SessionEntry | None:
        """
        The session of a container that is dialled.
        """
        return self._sessions.get(container_id)

    def snapshot(self) -> Snapshot:
        """
        Everything at the present version; the same object until something changes.
        """
        if self._snapshot is None:
            self._snapshot = Snapshot(
                self._version,
                MappingProxyType(self._containers.copy()),
                MappingProxyType(self._agents.copy()),
                MappingProxyType(self._sessions.copy()),
            )
        return self._snapshot

    def statistics(self) -> dict[str, int]:
        """
        Entries, the version, messages that were ignored and containers that had no room.
        """
        return {
            "version": self._version,
            "containers": len(self._containers),
            "agents": len(self._agents),
            "sessions": len(self._sessions),
            "ignored": self._ignored,
            "refused": self._containers.refused,
        }

    def _see(self, message: ContainerSeen) -> bool:
        if self._is_old(message.container.id, message.time_ns):
            return self._ignore()
        return self._put(message.container, message.time_ns)

    def _change(self, message: ContainerChange) -> bool:
        known = self._containers.get(message.id)
        if known is None or self._is_old(message.id, message.time_ns):
            return self._ignore()
        if isinstance(message, ContainerDestroyed):
            return self._destroy(message.id)
        return self._put(msgspec.structs.replace(known, **_effect(message)), message.time_ns)

    def _list(self, message: ContainersListed) -> bool:
        as_of = message.as_of_ns
        listed = {one.id: one for one in message.containers}
        changed = False
        for container_id in self._containers.keys_but(listed):
            if not self._has_newer(container_id, as_of):
                changed |= self._destroy(container_id)
        for one in listed.values():
            if not self._has_newer(one.id, as_of):
                changed |= self._put(one, as_of)
        return changed

    def _is_old(self, container_id: str, time_ns: int) -> bool:
        """Whether a message tells of a time before what is known; equal times are repeats, which change nothing."""
        return 0 < time_ns < self._times_ns.get(container_id, 0)

    def _has_newer(self, container_id: str, as_of_ns: int) -> bool:
        """Whether something is known to have happened to a container after a list was asked for."""
        return 0 < as_of_ns < self._times_ns.get(container_id, 0)

    def _put(self, entry: ContainerEntry, time_ns: int) -> bool:
        if not entry.running and (entry.address or entry.paused):
            # The engine takes the address back when a container dies; another may have it at once.
            entry = msgspec.structs.replace(entry, address="", paused=False)
        changed = self._containers.put(entry.id, entry)
        if self._containers.get(entry.id) is not None:
            self._times_ns[entry.id] = max(time_ns, self._times_ns.get(entry.id, 0))
        if not entry.running:
            changed |= self._sessions.remove(entry.id)
        return changed

    def _destroy(self, container_id: str) -> bool:
        self._sessions.remove(container_id)
        self._agents.remove(container_id)
        self._times_ns.pop(container_id, None)
        return self._containers.remove(container_id)

    def _set_agent(self, message: AgentChanged) -> bool:
        if self._containers.get(message.agent.id) is None:
            return self._ignore()
        return self._agents.put(message.agent.id, message.agent)

    def _set_session(self, message: SessionChanged) -> bool:
        known = self._containers.get(message.session.id)
        if known is None or not known.running:
            return self._ignore()
        return self._sessions.put(message.session.id, message.session)

    def _ignore(self) -> bool:
        self._ignored += 1
        return False


def _effect(message: ContainerChange) -> dict[str, Any]:
    match message:
        case ContainerDied():
            return {"running": False}
        case ContainerRenamed(name=name):
            return {"name": name}
        case ContainerConnected(address=address):
            return {"address": address}
        case ContainerDisconnected():
            return {"address": ""}
        case ContainerPaused(paused=paused):
            return {"paused": paused}
    raise TypeError(f"{type(message).__name__} has no meaning here")
