"""
Running agents as ControlService sees them: found by reference, listed as sessions, quarantined, released.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, Protocol

from clawker_cp.agents.directory import resolve
from clawker_cp.agents.registry import RegisteredAgent, Registry
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.errors import InvalidInput
from clawker_cp.rpc.control_agents import Session
from clawker_cp.wiring.enforcement import Living

_DIGEST_LENGTH = 64


class Verbs(Protocol):
    """`AgentControl`, as far as quarantines are concerned."""

    async def quarantine(self, agent: EnrolledAgent, reason: str) -> int: ...
    async def release(self, agent: EnrolledAgent) -> None: ...
    def quarantine_reason(self, agent_id: str) -> str: ...


class AgentView:
    """
    Fulfils `AgentFinder` and `AgentVerbs` of the servicers. `enrolled` asks the kernel, `exposures` the engine's
    record.
    """

    def __init__(
        self,
        roster: Roster,
        registry: Registry,
        control: Verbs,
        *,
        engine: str,
        enrolled: Callable[[EnrolledAgent], bool],
        exposures: Callable[[str], Sequence[str]] = lambda _agent_id: (),
        denied: Callable[[], Sequence[Living]] = lambda: (),
    ) -> None:
        self._roster = roster
        self._registry = registry
        self._control = control
        self._engine = engine
        self._enrolled = enrolled
        self._exposures = exposures
        self._denied = denied

    def find(self, container_id: str, project: str, agent: str) -> EnrolledAgent:
        """
        The one running agent a reference means.
        """
        return resolve(container_id, project, agent, self._roster)

    async def sessions(self, *, everything: bool) -> Sequence[Session]:
        """
        Every running agent, one that could not be enrolled included; with `everything` also registered ones that
        do not run.
        """
        running = {agent.id: agent for agent in self._roster}
        registered, reasons = await asyncio.to_thread(self._stored, list(running))
        found = [
            Session(
                agent=agent,
                engine=self._engine,
                running=True,
                enrolled=self._enrolled(agent),
                registered=agent.id in registered,
                thumbprint=registered[agent.id].thumbprint if agent.id in registered else "",
                last_seen_unix=registered[agent.id].last_seen if agent.id in registered else 0,
                quarantine_reason=reasons.get(agent.id, ""),
                exposures=self._exposures(agent.id),
            )
            for agent in running.values()
        ]
        found += [
            Session(
                agent=EnrolledAgent(one.id, one.project, one.agent, "", 0, 0),
                engine=self._engine,
                running=True,
                enrolled=False,
                registered=one.id in registered,
                exposures=self._exposures(one.id),
            )
            for one in self._denied()
            if one.id not in running
        ]
        if everything:
            found += [
                Session(
                    agent=EnrolledAgent(row.container_id, row.project, row.agent, "", 0, 0),
                    engine=self._engine,
                    running=False,
                    enrolled=False,
                    registered=True,
                    thumbprint=row.thumbprint,
                    last_seen_unix=row.last_seen,
                )
                for row in registered.values()
                if row.container_id not in running
            ]
        return found

    async def quarantine(self, agent: EnrolledAgent, reason: str) -> int:
        """See `AgentControl.quarantine`."""
        return await self._control.quarantine(agent, reason)

    async def release(self, agent: EnrolledAgent) -> None:
        """See `AgentControl.release`."""
        await self._control.release(agent)

    def _stored(self, running: Sequence[str]) -> tuple[dict[str, RegisteredAgent], dict[str, str]]:
        rows = {row.container_id: row for row in self._registry.snapshot()}
        return rows, {agent_id: self._control.quarantine_reason(agent_id) for agent_id in running}


class Bar(Protocol):
    """The authority's durable list of what was revoked."""

    async def bar(self, kind: str, id_: str) -> None: ...


class Caches(Protocol):
    """A listener's interceptor."""

    def revoke(
        self, *, token: str = "", token_sha256: bytes = b"", client_id: str = "", everything: bool = False
    ) -> int: ...


class TokenRevocation:
    """
    Revokes at the authority first, then in every listener's cache, so that no new question finds the token active.
    """

    def __init__(self, authority: Bar, caches: Sequence[Caches]) -> None:
        self._authority = authority
        self._caches = tuple(caches)

    async def revoke(
        self, *, token: str = "", token_sha256: str = "", client_id: str = "", everything: bool = False
    ) -> int:
        """
        Returns how many cached entries that dropped. Raises `InvalidInput` for a digest that is none.

        Cancelled or failed it has dropped them too: what the authority wrote nevertheless holds at once.
        """
        if token:
            token_sha256 = sha256(token.encode()).hexdigest()
        if token_sha256:
            digest = _digest(token_sha256)
            return await self._barred("digest", digest.hex(), token_sha256=digest)
        if client_id:
            return await self._barred("client", client_id, client_id=client_id)
        return await self._barred("all", "", everything=everything)

    async def _barred(self, kind: str, id_: str, **selector: Any) -> int:
        try:
            await self._authority.bar(kind, id_)
        finally:
            dropped = sum(cache.revoke(**selector) for cache in self._caches)
        return dropped


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(text) != _DIGEST_LENGTH or len(digest) * 2 != _DIGEST_LENGTH:
        raise InvalidInput("token_sha256: has to be 64 hex digits")
    return digest
