"""
Which agents have an address: a cache of what the engine said, never older than its events (contract 9.9).

Plain state on the loop; the engine module asks. A changed container is forgotten at once and comes back
when it is next described; an answer that was asked for before a change is not kept.
"""

from __future__ import annotations

from collections.abc import Callable

from clawker_cp.engines.base import AgentContainer
from clawker_cp.engines.host.process import start_time
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock

LIFE_S = 60.0
MAX_ENTRIES = 8192


class AddressCache:
    """
    Running agents by address, each kept for `LIFE_S` and while its first process lives. When full the oldest goes.

    `born` tells a process from a later one of the same number: an address that was handed on before the
    engine's event arrived is not answered with its former owner.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK, born: Callable[[int], int] = start_time) -> None:
        self._clock = clock
        self._born = born
        self._entries: dict[str, tuple[float, int, AgentContainer]] = {}
        self._changes = 0

    def mark(self) -> int:
        """
        Take this before asking the engine, and give it to `keep` with the answer.
        """
        return self._changes

    def keep(self, container: AgentContainer, mark: int) -> None:
        """
        Remember what the engine said, unless something changed since it was asked.
        """
        if mark != self._changes:
            return
        self._entries.pop(container.id, None)
        born = self._born(container.pid) if container.pid else 0
        if container.running and container.address and container.is_agent and (born or not container.pid):
            self._entries[container.id] = (self._clock.monotonic() + LIFE_S, born, container)
            if len(self._entries) > MAX_ENTRIES:
                del self._entries[next(iter(self._entries))]

    def at(self, address: str) -> list[AgentContainer]:
        """
        Those that have the address, as far as is remembered; nobody if one of them is no longer certain.
        """
        found = [entry for entry in self._entries.values() if entry[2].address == address]
        certain = [entry for entry in found if self._certain(*entry)]
        if len(certain) < len(found):
            for _until, _born, container in found:
                del self._entries[container.id]
            return []
        return [container for _until, _born, container in found]

    def forget(self, container_id: str) -> None:
        """
        Drop one container, and every answer that is on its way.
        """
        self._changes += 1
        self._entries.pop(container_id, None)

    def clear(self) -> None:
        """
        Drop everything, and every answer that is on its way.
        """
        self._changes += 1
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _certain(self, until: float, born: int, container: AgentContainer) -> bool:
        return until > self._clock.monotonic() and (not container.pid or self._born(container.pid) == born)
