"""
`Register`: an agent attests its own identity, once per container (contract 5.3).

The registry row pins the certificate of a container from then on: another one is refused unless its renewal was
announced. Registry and quarantines are synchronous; they are called in a thread.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

import structlog

from clawker_cp.agents.identity import CONTAINER_URI, Caller, Identity, Rejected, read_uri, same
from clawker_cp.agents.registry import MalformedRow, RegisteredAgent, Registry
from clawker_cp.errors import ClawkerError, Denied, InvalidInput
from clawker_cp.runtime.agent_names import is_name

log = structlog.get_logger()

_CONTAINER_ID = re.compile(r"[0-9a-f]+")


class Failed(ClawkerError):
    """A failure of ours, told with a constant text."""

    code = "REGISTER_FAILED"


class Registration:
    """
    Registers callers. `registered` is told the container id after each success: it ends a quarantine for trust.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        registered: Callable[[str], Awaitable[None]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._registered = registered
        self._wall = wall

    async def register(self, project: str, agent: str, identity: Identity | None, caller: Caller | None) -> None:
        """
        Register the caller under the identity its address gave it; names in the request are only compared.

        Raises `InvalidInput` for a name that is none, `Denied` for any contradiction, `Failed` when our own side
        cannot tell or store.
        """
        if not is_name(agent):
            raise InvalidInput("register: invalid agent name")
        if identity is None:
            raise Failed("register: identity not resolved")
        if caller is None:
            raise Denied("register: identity check failed")
        self._compare(project, agent, identity, caller)
        await asyncio.to_thread(self._store, identity, caller.thumbprint)
        await self._registered(identity.container_id)

    def _compare(self, project: str, agent: str, identity: Identity, caller: Caller) -> None:
        short = identity.container_id[:12]
        if not (same(project, identity.project) and same(agent, identity.agent)):
            raise Rejected("agent_register_request_label_mismatch", container_id=short)
        claimed = read_uri(caller.uris, CONTAINER_URI)
        if claimed is None:
            raise Rejected("agent_register_no_container_san", container_id=short)
        if not _CONTAINER_ID.fullmatch(claimed):
            raise Rejected("agent_register_malformed_container_san", container_id=short)
        if not same(claimed, identity.container_id):
            raise Rejected("agent_register_container_id_mismatch", container_id=short)

    def _store(self, identity: Identity, thumbprint: str) -> None:
        known = self._find(identity.container_id)
        now = int(self._wall())
        if known is not None:
            if same(known.thumbprint, thumbprint):
                log.info("agent_register_idempotent", container_id=identity.container_id[:12])
                return
            if not self._take_renewal(identity.container_id, thumbprint, now):
                raise Rejected("agent_register_thumbprint_replay", container_id=identity.container_id[:12])
            log.info("agent_registered", container_id=identity.container_id[:12], renewed=True)
            return
        row = RegisteredAgent(thumbprint, identity.container_id, identity.agent, identity.project, now, now)
        try:
            self._registry.add(row)
        except ClawkerError as error:
            raise Failed("register: persist failed") from error
        log.info(
            "agent_registered", container_id=identity.container_id[:12], project=identity.project, agent=identity.agent
        )

    def _find(self, container_id: str) -> RegisteredAgent | None:
        try:
            return self._registry.find(container_id)
        except MalformedRow as error:
            # Nobody can be meant by it: it goes, and the container registers anew.
            log.warning("agentregistry_row_skipped", container_id=container_id[:12], problem=error.message)
        except ClawkerError as error:
            raise Failed("register: lookup failed") from error
        try:
            self._registry.evict(container_id)
        except ClawkerError as error:
            raise Failed("register: lookup failed") from error
        return None

    def _take_renewal(self, container_id: str, thumbprint: str, now: int) -> bool:
        try:
            return self._registry.take_renewal(container_id, thumbprint, now)
        except ClawkerError as error:
            raise Failed("register: lookup failed") from error
