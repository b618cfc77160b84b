"""
AgentService over `agents.registration`: one method, called by agents alone.
"""

from __future__ import annotations

from typing import Any

import structlog

from clawker_cp._proto.clawker.agent.v1 import agent_pb2
from clawker_cp.agents.identity import Rejected
from clawker_cp.agents.registration import Registration
from clawker_cp.errors import InvalidInput
from clawker_cp.rpc.interceptors.identity import current_caller

log = structlog.get_logger()


class AgentServicer:
    """
    Answers `Register`. Refusals of one kind read alike to the caller; the log has which it was.
    """

    def __init__(self, registration: Registration) -> None:
        self._registration = registration

    async def Register(self, request: agent_pb2.RegisterRequest | None, _context: Any) -> agent_pb2.Welcome:  # noqa: N802
        """
        Register the caller (contract 5.3).
        """
        if request is None:
            raise InvalidInput("register: nil request")
        identity, caller = current_caller() or (None, None)
        try:
            await self._registration.register(request.project, request.agent_name, identity, caller)
        except Rejected as refusal:
            log.warning(refusal.event, **refusal.facts)
            raise
        return agent_pb2.Welcome()
