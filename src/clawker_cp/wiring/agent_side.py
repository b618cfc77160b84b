"""
What the server needs of whoever runs agents, whichever engine that is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from clawker_cp.agents.identity import Resolver
from clawker_cp.engines.base import AgentNetwork
from clawker_cp.rpc.control_sandboxes import Sandboxes
from clawker_cp.wiring.agent_control import AgentControl
from clawker_cp.wiring.enforcement import Living

# A supervised part: its name, what runs it, and what its failure costs.
Part = tuple[str, Callable[[], Awaitable[None]], str]


class AgentSide(Protocol):
    """
    One engine's agents. `sandboxes` is None where the engine runs none of its own.
    """

    name: str

    @property
    def sandboxes(self) -> Sandboxes | None: ...
    @property
    def resolver(self) -> Resolver: ...
    @property
    def network(self) -> AgentNetwork: ...

    def living(self) -> Sequence[Living]:
        """The agents that run, as last known."""
        ...

    async def running(self) -> Sequence[Living]:
        """The agents that run, asked now. Raises when it cannot be known."""
        ...

    async def find(self, reference: str) -> Living:
        """The running, enrolled agent that a full id, a prefix or a name means. Raises `ClawkerError`."""
        ...

    def exposures(self, agent_id: str) -> Sequence[str]:
        """Ways out that an agent was given by its owner (R34)."""
        ...

    def denied(self) -> Sequence[Living]:
        """Running agents that could not be enrolled."""
        ...

    def failures(self) -> Mapping[str, str]:
        """Why, by id."""
        ...

    async def prepare(self) -> None:
        """Make what all agents share, and find those that run; before anything listens."""
        ...

    async def cgroups(self) -> set[int]:
        """Cgroups of agents that live, asked now: rows of others are dead remains."""
        ...

    async def enrol_all(self) -> None:
        """Enrol every agent that runs, after the firewall was turned on."""
        ...

    async def see_neighbour(self, container_id: str, /) -> None:
        """Let frames of a container pass that serves agents and was just started."""
        ...

    def parts(self) -> list[Part]:
        """What has to run beside serving."""
        ...

    async def take_over(self, group: asyncio.TaskGroup, agents: AgentControl) -> list[asyncio.Task[None]]:
        """Enrol what runs already and take new ones from here on; returns what is cancelled at the end."""
        ...

    def close(self) -> None:
        """Take no new agents."""
        ...

    def stages(self, *, empty: bool) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        """The last stages of a drain; `empty`: no agent lives, so nothing of ours stays."""
        ...
