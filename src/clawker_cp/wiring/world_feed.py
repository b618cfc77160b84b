"""
From the engine's events to what the worldview is made of.

An event that says all there is to say is told on as it is; after others the engine is asked. What cannot be
had ends the feed with an error: its owner starts it again, and it begins with a list.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from clawker_cp.agents.roster import EnrolledAgent
from clawker_cp.agents.world_messages import (
    AgentChanged,
    AgentEntry,
    AgentForgotten,
    ContainerDestroyed,
    ContainerDied,
    ContainerDisconnected,
    ContainerEntry,
    ContainerPaused,
    ContainerRenamed,
    ContainerSeen,
    ContainersListed,
)
from clawker_cp.agents.worldview import Worldview
from clawker_cp.engines.base import AgentContainer
from clawker_cp.engines.dockerevents import DockerEvent
from clawker_cp.errors import NotFound
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.subscriptions import Overflow

Told = ContainerDied | ContainerDestroyed | ContainerRenamed | ContainerPaused | ContainerDisconnected
# Actions after which only the engine's record says what is so: addresses and labels are in no event.
_ASKED = frozenset((("container", "create"), ("container", "start"), ("container", "restart"), ("network", "connect")))
_TOLD = frozenset(
    (("network", "disconnect"), *(("container", one) for one in ("die", "destroy", "rename", "pause", "unpause")))
)


def entry_of(container: AgentContainer) -> ContainerEntry:
    """
    The engine's record as an entry.
    """
    return ContainerEntry(
        id=container.id,
        name=container.name,
        project=container.project,
        agent=container.agent,
        is_agent=container.is_agent,
        running=container.running,
        paused=container.running and container.paused,
        address=container.address if container.running else "",
    )


def concerns(event: DockerEvent, network_id: str) -> bool:
    """
    Whether an event is about the life of a container, or its place on the agents' network.
    """
    if event.kind == "network" and event.id != network_id:
        return False
    return bool(event.container_id) and (event.kind, event.action) in _ASKED | _TOLD


def told(event: DockerEvent) -> Told | None:
    """
    What an event that concerns us says by itself; None: ask the engine.
    """
    container_id, time_ns = event.container_id, event.time_ns
    match event.kind, event.action:
        case "container", "die":
            return ContainerDied(container_id, time_ns)
        case "container", "destroy":
            return ContainerDestroyed(container_id, time_ns)
        case "container", "rename" if event.name:
            return ContainerRenamed(container_id, time_ns, name=event.name.removeprefix("/"))
        case "container", "pause" | "unpause" as action:
            return ContainerPaused(container_id, time_ns, paused=action == "pause")
        case "network", "disconnect":
            return ContainerDisconnected(container_id, time_ns)
    return None


def tell_agent(overseer: Overseer) -> Callable[[str, EnrolledAgent | None], None]:
    """
    What hears of the roster's changes, and tells the worldview.
    """

    def tell(agent_id: str, agent: EnrolledAgent | None) -> None:
        if agent is None:
            overseer.publish(AgentForgotten(agent_id))
        else:
            entry = AgentEntry(agent_id, enrolled=True, quarantined=agent.quarantined, policy=agent.policy)
            overseer.publish(AgentChanged(entry))

    return tell


class ContainerNames:
    """
    Fulfils `dns.ports.Internal`: addresses of containers by name, as the worldview has them.
    """

    def __init__(self, world: Worldview) -> None:
        self._world = world

    def address_of(self, name: str, /) -> str | None:
        """The address of the one running container of that name, None for none or several."""
        found = [one.address for one in self._world.snapshot().containers.values() if one.name == name and one.running]
        return found[0] if len(found) == 1 and found[0] else None


class WorldFeed:
    """
    Publishes what a `Worldview` folds. `inspect` raises `NotFound` for what is gone; `existing` gives the ids of all.
    """

    def __init__(
        self,
        overseer: Overseer,
        inspect: Callable[[str], Awaitable[AgentContainer]],
        existing: Callable[[], Awaitable[Iterable[str]]],
        network_id: str,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._overseer = overseer
        self._inspect = inspect
        self._existing = existing
        self._network_id = network_id
        self._clock = clock

    async def run(self) -> None:
        """
        Follow until the bus is closed; a list first and after every loss. Raises what the engine raises.
        """
        async with self._overseer.subscription(
            DockerEvent, name="worldview", wanted=lambda event: concerns(event, self._network_id)
        ) as events:
            # Subscribed before the list is asked for: what happens meanwhile waits (R25).
            await self._list()
            async for event in events:
                if isinstance(event, Overflow):
                    await self._list()
                elif (message := told(event)) is not None:
                    self._overseer.publish(message)
                else:
                    await self._look(event.container_id, event.time_ns)

    async def _look(self, container_id: str, time_ns: int) -> None:
        # The record is of now, the event of before: a later one that waits already is not taken for older.
        try:
            found = await self._inspect(container_id)
        except NotFound:
            self._overseer.publish(ContainerDestroyed(container_id, time_ns))
            return
        self._overseer.publish(ContainerSeen(entry_of(found), time_ns))

    async def _list(self) -> None:
        as_of_ns = self._clock.wall_ns()
        found = []
        for container_id in await self._existing():
            try:
                found.append(entry_of(await self._inspect(container_id)))
            except NotFound:
                continue  # gone since the list was made
        self._overseer.publish(ContainersListed(tuple(found), as_of_ns))
