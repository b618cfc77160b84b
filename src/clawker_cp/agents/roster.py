"""
Who is enrolled right now: the one in-memory table that address, cgroup and name look-ups share.

The application fills it from the engine's record (I9); the DNS gate asks it by address, flow
enrichment by cgroup id. Owns no I/O and no kernel row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class EnrolledAgent:
    """
    One running agent and how the kernel judges it.

    `key` is its scope, "agent:<project>/<agent>"; `bypass_until_ns` is CLOCK_MONOTONIC, as in
    the kernel row; `address` is text.
    """

    id: str
    project: str
    agent: str
    address: str
    cgroup_id: int
    policy: int
    learn: bool = False
    quarantined: bool = False
    bypass_until_ns: int = 0
    clock_ns: Callable[[], int] = time.monotonic_ns

    @property
    def key(self) -> str:
        return f"agent:{self.project}/{self.agent}"

    @property
    def bypassed(self) -> bool:
        return self.bypass_until_ns > self.clock_ns()


def _nobody_listens(_agent_id: str, _agent: EnrolledAgent | None) -> None:
    return


class Roster:
    """
    The enrolled agents, found by id, address or cgroup.

    An address or cgroup held by two agents answers None: identity is exactly one match or none. `told` hears of
    every change: the id, and what is known now, None = nothing any more.
    """

    def __init__(self, told: Callable[[str, EnrolledAgent | None], None] = _nobody_listens) -> None:
        self._told = told
        self._by_id: dict[str, EnrolledAgent] = {}
        self._by_address: dict[str, EnrolledAgent | None] = {}
        self._by_cgroup: dict[int, EnrolledAgent | None] = {}

    def put(self, agent: EnrolledAgent) -> None:
        """
        Add an agent, or replace what is known of it.
        """
        self._by_id[agent.id] = agent
        self._index()
        self._told(agent.id, agent)

    def update(self, agent_id: str, **changes: Any) -> EnrolledAgent | None:
        """
        Change fields of a known agent; an unknown id changes nothing.
        """
        known = self._by_id.get(agent_id)
        if known is None:
            return None
        changed = replace(known, **changes)
        self.put(changed)
        return changed

    def remove(self, agent_id: str) -> None:
        """
        Forget an agent; an unknown id changes nothing.
        """
        if self._by_id.pop(agent_id, None) is not None:
            self._index()
            self._told(agent_id, None)

    def by_id(self, agent_id: str) -> EnrolledAgent | None:
        return self._by_id.get(agent_id)

    def by_address(self, address: str) -> EnrolledAgent | None:
        return self._by_address.get(address)

    def by_cgroup(self, cgroup_id: int) -> EnrolledAgent | None:
        return self._by_cgroup.get(cgroup_id)

    def policy_of(self, agent_id: str) -> int:
        """
        The policy number of an agent, 0 for one that is not known.
        """
        agent = self._by_id.get(agent_id)
        return agent.policy if agent is not None else 0

    def with_key(self, key: str) -> list[EnrolledAgent]:
        return [agent for agent in self._by_id.values() if agent.key == key]

    def __iter__(self) -> Iterator[EnrolledAgent]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def _index(self) -> None:
        # Rebuilt whole: a few thousand rows at most, and only on enrolment changes.
        self._by_address, self._by_cgroup = {}, {}
        for agent in self._by_id.values():
            self._by_address[agent.address] = None if agent.address in self._by_address else agent
            self._by_cgroup[agent.cgroup_id] = None if agent.cgroup_id in self._by_cgroup else agent


class RosterResolver:
    """
    Fulfils `identity.Resolver` with the roster: for engines whose every running agent is enrolled.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    async def running_at(self, address: str) -> list[EnrolledAgent]:
        """
        Every agent that has the address; more than one is for the caller to refuse.
        """
        return [agent for agent in self._roster if agent.address == address]
