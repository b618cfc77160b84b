"""
Authentication and authorisation of every RPC (contract 5.1): certificate, common name, scope of the method, token.

The gRPC side of `auth.authorizer`: reads the call, asks, refuses with the exact codes and messages. Anything
unknown or unexpected is a refusal (I10).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from clawker_cp.accel import TokenCache, presented_token
from clawker_cp.auth.authorizer import FAILED, Authorizer, Bars, Pending, Refusal
from clawker_cp.auth.bearer import is_token
from clawker_cp.auth.introspect import Introspector
from clawker_cp.auth.scopes import PUBLIC
from clawker_cp.rpc.interceptors.denials import DenialLog
from clawker_cp.rpc.interceptors.handlers import ending, guarded
from clawker_cp.rpc.peer import peer_of
from clawker_cp.rpc.transport import grpc

NO_CERTIFICATE = Refusal(False, "TLS 1.3 with a client certificate required")
WRONG_CERTIFICATE = Refusal(True, "client certificate not accepted here")
UNMAPPED = Refusal(False, "unauthorized", "method without a scope")
NO_TOKEN = Refusal(False, "missing bearer token")
NOT_SERVED = "method not found"

# Result and seconds of a call whose token had to be asked about; must not block or raise.
Observe = Callable[[str, float], None]

_ALL = frozenset({(False, False), (False, True), (True, False), (True, True)})
_UNARY = frozenset({(False, False)})


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """
    Lets a call pass to its handler if its certificate, token, client and scope say so; fails closed.

    `method_scopes` maps full method names to scopes; `public` needs the certificate only, and a method that is not
    there is refused. A cached token is judged without awaiting. One per listener: a token belongs to the
    certificate that first presents it there. `interceptors()` is what `grpc.aio.server` takes. `observe` is told how
    long a question about a token took, and how it ended.
    """

    def __init__(
        self,
        introspector: Introspector,
        method_scopes: Mapping[str, str],
        *,
        cache: TokenCache | None = None,
        log: Any = None,
        ttl_s: float = 10.0,
        negative_ttl_s: float = 1.0,
        bars: Bars | None = None,
        room: asyncio.Semaphore | None = None,
        observe: Observe | None = None,
    ) -> None:
        self._authorizer = Authorizer(
            introspector, cache=cache, ttl_s=ttl_s, negative_ttl_s=negative_ttl_s, bars=bars, room=room
        )
        self._scopes = dict(method_scopes)
        self._denials = DenialLog(log)
        self._common_name: str | None = None
        self._observe = observe
        self._passed = 0
        self._asked = 0
        self._passed_asked = 0
        self._failed = 0
        self._everything = _Kinds(self, _ALL)
        self.unary_interceptor = _Kinds(self, _UNARY)
        self.stream_interceptor = _Kinds(self, _ALL - _UNARY)

    def require_client_id(self, client_id: str) -> AuthInterceptor:
        """
        From now on a token of another client is PERMISSION_DENIED although its scope would do; returns self.
        """
        if not client_id:
            raise ValueError("client_id: must not be empty, or every client would pass")
        self._authorizer.client_id = client_id
        return self

    def require_common_name(self, common_name: str) -> AuthInterceptor:
        """
        From now on only certificates with this common name are accepted, also for public methods; returns self.
        """
        if not common_name:
            raise ValueError("common_name: must not be empty, or every certificate would pass")
        self._common_name = common_name
        return self

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """
        One interceptor for all four kinds of RPC.
        """
        return [self._everything]

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """
        The instance itself is an interceptor for all kinds, too.
        """
        return await self._everything.intercept_service(continuation, details)

    def revoke(
        self, *, token: str = "", token_sha256: bytes = b"", client_id: str = "", everything: bool = False
    ) -> int:
        """
        Forget what is known of a token, a client, or all, at once; returns how many entries went.

        The bar list is to be written first, or the next question finds the token active again.
        """
        return self._authorizer.revoke(
            token=token, token_sha256=token_sha256, client_id=client_id, everything=everything
        )

    def unmapped(self, methods: frozenset[str]) -> list[str]:
        """
        Those of the methods that would be refused for want of a scope.
        """
        return sorted(method for method in methods if not self._scopes.get(method))

    def statistics(self) -> dict[str, int]:
        """
        Counts of the cache and of the questions, and calls that passed, were asked about, were denied.

        Each call is one of `hit` (passed without asking), `miss` (passed after asking), `error` (nobody could say) and
        `refused`.
        """
        return {
            **self._authorizer.statistics(),
            "passed": self._passed,
            "asked": self._asked,
            "denied": self._denials.total,
            "hit": self._passed - self._passed_asked,
            "miss": self._passed_asked,
            "error": self._failed,
            "refused": self._denials.total - self._failed,
        }

    async def aclose(self) -> None:
        """
        End the questions that are on their way; their callers are refused.
        """
        await self._authorizer.aclose()

    def admit(self, context: Any, method: str) -> Coroutine[Any, Any, None] | None:
        """
        Judge a call: None = it passes; else to be awaited, which passes or aborts the call.
        """
        try:
            refusal = self._judge(context, method)
        except Exception as error:  # noqa: BLE001 - a surprise is a denial (I10)
            refusal = Refusal(False, FAILED.message, f"surprise: {type(error).__name__}")
        if refusal is None:
            self._passed += 1
            return None
        return self._refuse(context, method, refusal) if isinstance(refusal, Refusal) else refusal

    def _judge(self, context: Any, method: str) -> Refusal | Coroutine[Any, Any, None] | None:
        peer = peer_of(context)
        if peer is None:
            return NO_CERTIFICATE
        wanted = self._common_name
        if wanted is not None and peer.common_name != wanted:  # no secret: the caller showed it
            return WRONG_CERTIFICATE
        scope = self._scopes.get(method)
        if not scope:
            return UNMAPPED
        if scope == PUBLIC:
            return None
        token = presented_token(context.invocation_metadata())
        if not token:
            return NO_TOKEN
        decided = self._authorizer.decide(token, peer.thumbprint, scope)
        if isinstance(decided, Pending):
            # Only what can be a token is ever asked about, so only that is ever in the cache.
            if not is_token(token):
                return NO_TOKEN
            return self._ask(context, method, decided, token, peer.thumbprint, scope)
        return decided

    async def _ask(
        self, context: Any, method: str, pending: Pending, token: str, certificate: bytes, scope: str
    ) -> None:
        self._asked += 1
        begun = time.monotonic()
        try:
            refusal = await self._authorizer.ask(pending, token, certificate, scope)
        except Exception as error:  # noqa: BLE001 - a surprise is a denial (I10)
            refusal = Refusal(False, FAILED.message, f"surprise: {type(error).__name__}")
        if self._observe is not None:
            result = "miss" if refusal is None else "error" if refusal.message == FAILED.message else "denied"
            self._observe(result, time.monotonic() - begun)
        if refusal is not None:
            await self._refuse(context, method, refusal)
        self._passed += 1
        self._passed_asked += 1

    async def _refuse(self, context: Any, method: str, refusal: Refusal) -> None:
        self._failed += refusal.message == FAILED.message
        code = grpc.StatusCode.PERMISSION_DENIED if refusal.authenticated else grpc.StatusCode.UNAUTHENTICATED
        self._denials.report(
            method=method[:200], peer=context.peer(), code=code.name, message=refusal.message, cause=refusal.cause
        )
        await context.abort(code, refusal.message)


class _Kinds(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Guards the methods of some kinds of RPC, and refuses those nobody serves."""

    def __init__(self, auth: AuthInterceptor, kinds: frozenset[tuple[bool, bool]]) -> None:
        self._auth = auth
        self._kinds = kinds
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        method = details.method
        known = self._wrapped.get(method)
        if known is not None and known[0] is handler:
            return known[1]
        if handler is None:
            return ending(lambda context: self._not_served(context, method))
        if (bool(handler.request_streaming), bool(handler.response_streaming)) not in self._kinds:
            return handler
        wrapped = guarded(handler, lambda context: self._auth.admit(context, method))
        if known is not None or len(self._wrapped) < 1024:
            self._wrapped[method] = (handler, wrapped)
        return wrapped

    async def _not_served(self, context: Any, method: str) -> None:
        # Also what is not there is told only to those who may ask.
        waiting = self._auth.admit(context, method)
        if waiting is not None:
            await waiting
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NOT_SERVED)
