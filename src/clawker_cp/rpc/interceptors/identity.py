"""
The last interceptor of the agents' listener: gives the handler the identity of its caller, or refuses the call.

The gRPC side of `agents.identity`. The identity lives in a context variable for the length of the call.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote

import structlog

from clawker_cp.agents.identity import REJECTED, Caller, Identity, Rejected, Resolver, identify
from clawker_cp.rpc.interceptors.handlers import guarded
from clawker_cp.rpc.peer import peer_of
from clawker_cp.rpc.transport import grpc

log = structlog.get_logger()

_CALLER: ContextVar[tuple[Identity, Caller] | None] = ContextVar("clawker_caller", default=None)


def current_caller() -> tuple[Identity, Caller] | None:
    """
    Who the call of this task comes from; None outside of a call that was identified.
    """
    return _CALLER.get()


class IdentityInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """
    Lets a call pass whose address, engine's record and certificate agree; PERMISSION_DENIED otherwise.
    """

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        return None if handler is None else guarded(handler, self._admit)

    async def _admit(self, context: Any) -> None:
        try:
            caller = caller_of(context)
            identity = await identify(caller, self._resolver)
        except Rejected as refusal:
            log.warning(refusal.event, **refusal.facts)
        except Exception as error:  # a surprise is a denial (I10)
            log.error("agent_identity_failed", cause=type(error).__name__, exc_info=error)
        else:
            _CALLER.set((identity, caller))
            return
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, REJECTED)


def caller_of(context: Any) -> Caller:
    """
    What TLS and the kernel say of the other end. Raises `Rejected` without a certificate or a TCP address.
    """
    peer, address = peer_of(context), peer_address(context.peer())
    if peer is None or not address:
        raise Rejected("agent_identity_peer_auth_missing")
    return Caller(peer.common_name, peer.uris, peer.thumbprint.hex(), address)


def peer_address(peer: str) -> str:
    """
    The address in gRPC's name of a peer (`ipv4:192.0.2.1:80`, `ipv6:[::1]:80`, percent-encoded); "" for others.
    """
    family, _, rest = unquote(peer).partition(":")
    if family not in {"ipv4", "ipv6"}:
        return ""
    return rest.rpartition(":")[0].strip("[]").partition("%")[0]
