"""
What is told about containers, agents and sessions on the bus, and the entries they become in the worldview.

Engines know other events than these; `wiring` makes them from the engine's. `time_ns` is always the
engine's clock, 0 when it is not known.
"""

from __future__ import annotations

import enum

import msgspec


class ContainerEntry(msgspec.Struct, frozen=True, gc=False):
    """
    A container as the engine's record has it. `address` is on the agents' network, "" without one or while it
    does not run.
    """

    id: str
    name: str = ""
    project: str = ""
    agent: str = ""
    is_agent: bool = True
    running: bool = True
    paused: bool = False
    address: str = ""


class AgentEntry(msgspec.Struct, frozen=True, gc=False):
    """
    What this server holds of the agent in a container; `trusted` None = not judged.
    """

    id: str
    registered: bool = False
    trusted: bool | None = None
    trust_reason: str = ""
    enrolled: bool = False
    quarantined: bool = False
    policy: int = 0


class SessionState(enum.IntEnum):
    """Equal to the wire enum `SessionState`."""

    UNSPECIFIED = 0
    CONNECTING = 1
    CONNECTED = 2
    BROKEN = 3
    FAILED = 4


class SessionEntry(msgspec.Struct, frozen=True, gc=False):
    """
    The channel to the agent's daemon. `attempts` belong to the present dial cycle.
    """

    id: str
    state: SessionState
    attempts: int = 0
    connected_at_unix: int = 0
    last_seen_unix: int = 0
    last_error: str = ""
    daemon_version: str = ""


class ContainerSeen(msgspec.Struct, frozen=True, gc=False):
    """
    The engine's whole record of one container, asked for after it was created, started or changed.
    """

    container: ContainerEntry
    time_ns: int = 0


class ContainerChange(msgspec.Struct, frozen=True, gc=False):
    """Base of what happens to a container that is known."""

    id: str
    time_ns: int = 0


class ContainerDied(ContainerChange, frozen=True, gc=False):
    """It runs no more; it still exists and may be started again."""


class ContainerDestroyed(ContainerChange, frozen=True, gc=False):
    """It does not exist any more."""


class ContainerRenamed(ContainerChange, frozen=True, gc=False, kw_only=True):
    """It has another name."""

    name: str


class ContainerConnected(ContainerChange, frozen=True, gc=False, kw_only=True):
    """It has an address on the agents' network."""

    address: str


class ContainerDisconnected(ContainerChange, frozen=True, gc=False):
    """It has left the agents' network."""


class ContainerPaused(ContainerChange, frozen=True, gc=False, kw_only=True):
    """Its processes were frozen, or go on."""

    paused: bool


class ContainersListed(msgspec.Struct, frozen=True):
    """
    Everything the engine has. `as_of_ns` is a time before it was asked; what is known to have happened since stays.
    """

    containers: tuple[ContainerEntry, ...]
    as_of_ns: int = 0


class AgentChanged(msgspec.Struct, frozen=True, gc=False):
    """What this server holds of an agent is now this."""

    agent: AgentEntry


class AgentForgotten(msgspec.Struct, frozen=True, gc=False):
    """This server holds nothing of the agent in this container any more."""

    id: str


class SessionChanged(msgspec.Struct, frozen=True, gc=False):
    """The session of a container is now this."""

    session: SessionEntry


class SessionEnded(msgspec.Struct, frozen=True, gc=False):
    """Nobody dials this container any more."""

    id: str
