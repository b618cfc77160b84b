"""
The engine's events as one typed envelope, and their only producer.

`DockerEventFeeder` follows containers and networks for as long as it runs, over daemon restarts. After
every gap it compares with what exists and tells the difference as events of its own, so a consumer that
is idempotent misses nothing. Decides nothing about agents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.errors import ClawkerError, InvalidInput
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock

log = structlog.get_logger()

RECONCILE_S = 60.0
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
_NS = 1_000_000_000


class DockerEvent(msgspec.Struct, frozen=True, gc=False):
    """
    One thing that happened to a container or a network.

    `id` is that of the container or the network, `attributes` the engine's (a container's labels among them),
    `raw` the engine's message verbatim; empty when the feeder told it after a gap (`synthetic`).
    """

    kind: str
    action: str
    id: str
    name: str = ""
    attributes: Mapping[str, str] = {}
    time_ns: int = 0
    raw: bytes = b""

    @property
    def synthetic(self) -> bool:
        """Whether this is the outcome of a comparison, not a message of the engine."""
        return not self.raw

    @property
    def container_id(self) -> str:
        """The container it is about; of a network event, who joined or left, "" for neither."""
        return self.id if self.kind == "container" else self.attributes.get("container", "")


class _Actor(msgspec.Struct, rename={"id": "ID", "attributes": "Attributes"}):
    id: str = ""
    attributes: dict[str, str] | None = None


class _Message(msgspec.Struct, rename={"kind": "Type", "action": "Action", "actor": "Actor", "time_ns": "timeNano"}):
    kind: str
    action: str
    actor: _Actor
    time_ns: int = 0
    time: int = 0


_DECODER = msgspec.json.Decoder(_Message)


def parse_event(raw: bytes) -> DockerEvent:
    """
    Read one message of the engine. Raises `InvalidInput` for what is none.
    """
    try:
        message = _DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"not an engine event: {error}") from error
    if not message.kind or not message.action or not message.actor.id:
        raise InvalidInput("not an engine event: type, action or id is empty")
    attributes = message.actor.attributes or {}
    time_ns = message.time_ns or message.time * _NS
    name = attributes.get("name", "")
    return DockerEvent(message.kind, message.action, message.actor.id, name, attributes, time_ns, raw)


def since(time_ns: int) -> str:
    """
    A moment as the engine reads it: `<sec>.<9 digits>`.
    """
    return f"{time_ns // _NS}.{time_ns % _NS:09d}"


@dataclass(frozen=True, slots=True)
class Known:
    """A container as it was last seen: `state` is the engine's word, `running`, `paused`, `exited`, ..."""

    name: str
    state: str
    labels: Mapping[str, str] = field(default_factory=dict)


# What a container is after an action; others change nothing that a comparison tells.
_AFTER = {
    "create": "created",
    "start": "running",
    "restart": "running",
    "unpause": "running",
    "pause": "paused",
    "die": "exited",
}
_ALIVE = frozenset(("running", "paused", "restarting"))


def listed(entries: list[dict[str, Any]]) -> dict[str, Known]:
    """
    The containers of a list answer, by id.
    """
    found = {}
    for entry in entries:
        names = entry.get("Names") or [""]
        labels = entry.get("Labels") or {}
        found[str(entry["Id"])] = Known(str(names[0]).removeprefix("/"), str(entry.get("State", "")), labels)
    return found


def differences(known: Mapping[str, Known], found: Mapping[str, Known], time_ns: int) -> list[DockerEvent]:
    """
    Events that lead from what was known to what exists; those of the vanished first, as their addresses are free.
    """

    def event(action: str, number: str, container: Known) -> DockerEvent:
        attributes = {**container.labels, "name": container.name}
        return DockerEvent("container", action, number, container.name, attributes, time_ns)

    gone = [event("destroy", number, known[number]) for number in known if number not in found]
    told = []
    for number, container in found.items():
        before = known.get(number)
        if before is None:
            told.append(event("create", number, container))
        elif before.name != container.name:
            told.append(event("rename", number, container))
        state = before.state if before else "created"
        if state in _ALIVE and container.state not in _ALIVE:
            told.append(event("die", number, container))
        elif state not in _ALIVE and container.state in _ALIVE:
            told.append(event("start", number, container))
            state = "running"
        if container.state == "paused" and state != "paused":
            told.append(event("pause", number, container))
        elif container.state == "running" and state == "paused":
            told.append(event("unpause", number, container))
    return gone + told


def follow(known: dict[str, Known], event: DockerEvent) -> None:
    """
    Bring what is known up to date with an event.
    """
    if event.kind != "container":
        return
    if event.action == "destroy":
        known.pop(event.id, None)
        return
    before = known.get(event.id)
    if before is None and event.action not in _AFTER:
        return
    state = _AFTER.get(event.action, before.state if before else "")
    known[event.id] = Known(event.name or (before.name if before else ""), state, event.attributes)


class DockerEventFeeder:
    """
    Publishes every container and network event, in order, for as long as `run` runs.

    Subscribes before it lists (R25): the comparison is told first, then what came in meanwhile, so an event may
    come twice, or after its outcome was told; none is missed. A gap is replayed from the last event seen, without
    repeating it. `publish` must neither block nor raise. A daemon that is gone is tried again with capped
    back-off; `changed` hears of loss and return with the cause, "" = following.
    """

    def __init__(
        self,
        client: DockerClient,
        publish: Callable[[DockerEvent], None],
        *,
        changed: Callable[[str], None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        reconcile_s: float = RECONCILE_S,
    ) -> None:
        self._client = client
        self._publish = publish
        self._changed = changed
        self._clock = clock
        self._reconcile_s = reconcile_s
        self._known: dict[str, Known] = {}
        self._last_ns = 0
        self._at_last: set[bytes] = set()
        self._lost_since = ""
        self._pause_s = RETRY_MIN_S
        self._counts = {"events": 0, "synthetic": 0, "malformed": 0, "connects": 0, "reconciles": 0}
        self.following = asyncio.Event()

    async def run(self) -> None:
        """
        Follow until cancelled.
        """
        while True:
            try:
                await self._follow()
            except ClawkerError as error:
                self._lost(str(error))
            await self._clock.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, RETRY_MAX_S)

    def statistics(self) -> dict[str, int]:
        """
        Events told, those told after a comparison, malformed messages, connections, comparisons, containers known.
        """
        return {**self._counts, "known": len(self._known)}

    async def _follow(self) -> None:
        """One connection; ends by raising."""
        if not self._last_ns:
            # The engine answers before it has subscribed us: events of that moment come from its own buffer.
            self._last_ns = self._clock.wall_ns()
        async with self._client.events(since(self._last_ns)) as stream:
            self._counts["connects"] += 1
            while True:
                await self._reconcile()
                self._found()
                due = self._clock.monotonic() + self._reconcile_s
                while (left := due - self._clock.monotonic()) > 0:
                    try:
                        async with asyncio.timeout(left):
                            raw = await anext(stream)
                    except TimeoutError:
                        break
                    self._take(raw)

    async def _reconcile(self) -> None:
        # Nothing is read from the stream meanwhile, so the list is never older than what was told.
        found = listed(await self._client.list_containers(every=True))
        self._counts["reconciles"] += 1
        for event in differences(self._known, found, self._clock.wall_ns()):
            self._counts["synthetic"] += 1
            self._publish(event)
        self._known = found

    def _take(self, raw: bytes) -> None:
        try:
            event = parse_event(raw)
        except InvalidInput as error:
            self._counts["malformed"] += 1
            log.warning("engines_event_malformed", error=str(error), size=len(raw))
            return
        if raw in self._at_last:
            return
        if event.time_ns > self._last_ns:
            self._last_ns = event.time_ns
            self._at_last.clear()
        if event.time_ns == self._last_ns:
            self._at_last.add(raw)
        self._counts["events"] += 1
        follow(self._known, event)
        self._publish(event)

    def _lost(self, cause: str) -> None:
        self.following.clear()
        if cause != self._lost_since:
            self._lost_since = cause
            log.error(
                "engine_unavailable",
                cause=cause,
                retry_s=self._pause_s,
                blast_radius="starts and ends of containers are seen late; enforcement holds",
            )
            if self._changed is not None:
                self._changed(cause)

    def _found(self) -> None:
        self.following.set()
        self._pause_s = RETRY_MIN_S
        if self._lost_since:
            self._lost_since = ""
            log.info("engine_recovered")
            if self._changed is not None:
                self._changed("")
