"""
May this call pass: token, certificate, scope, client; cached, one question at a time per token.

`decide` answers from the cache without awaiting (the hot path); `ask` introspects. Both deny on anything
unexpected (I10). Used on the loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import structlog

from clawker_cp.accel import Granted, TokenCache, has_scope
from clawker_cp.auth.introspect import IntrospectionResult, Introspector

log = structlog.get_logger()

QUESTIONS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call may not pass: a category of `errors` and the caller's message (contract 5.1)."""

    authenticated: bool  # False = UNAUTHENTICATED, True = PERMISSION_DENIED
    message: str
    cause: str = ""  # for the log only


FAILED = Refusal(False, "token validation failed", "introspection failed")
INACTIVE = Refusal(False, "token inactive or invalid")
BOUND = Refusal(True, "token bound to another certificate")
_UNDECIDED = None


@dataclass(frozen=True, slots=True)
class Pending:
    """Nothing is known of the token: `ask` has to."""

    key: bytes


class Authorizer:
    """
    Judges tokens for one listener. `client_id` pins whose tokens count, "" = anybody's with the scope.
    """

    def __init__(
        self,
        introspector: Introspector,
        *,
        cache: TokenCache | None = None,
        client_id: str = "",
        ttl_s: float = 10.0,
        negative_ttl_s: float = 1.0,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._introspector = introspector
        self._cache = cache or TokenCache()
        self.client_id = client_id
        self._ttl_s = ttl_s
        self._negative_ttl_s = negative_ttl_s
        self._wall = wall
        self._monotonic = monotonic
        self._flights: dict[bytes, asyncio.Future[Refusal | Granted]] = {}
        self._room = asyncio.Semaphore(QUESTIONS_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self.errors = 0

    def decide(self, token: str, certificate: bytes, scope: str) -> Refusal | Pending | None:
        """
        Judge from the cache: None = may pass, `Pending` = has to be asked. `certificate` is SHA-256 of the DER.
        """
        key = self._cache.key(certificate, token.encode())
        found = self._cache.lookup(key, self._wall(), self._monotonic())
        if found is True:
            return Pending(key)
        return INACTIVE if found is False else self._judge(found, scope)  # type: ignore[arg-type]

    async def ask(self, pending: Pending, token: str, certificate: bytes, scope: str) -> Refusal | None:
        """
        Introspect, keep the answer, judge. Callers of one token share one question; a caller that goes
        away does not cancel it.
        """
        digest = sha256(token.encode()).digest()
        if not self._cache.owns(digest, certificate, self._wall()):
            return BOUND
        flight = self._flights.get(pending.key)
        if flight is None:
            flight = self._flights[pending.key] = asyncio.get_running_loop().create_future()
            task = asyncio.get_running_loop().create_task(
                self._fly(pending.key, digest, token, certificate, flight), name="introspect"
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        answer = await asyncio.shield(flight)
        return answer if isinstance(answer, Refusal) else self._judge(answer, scope)

    def revoke(
        self, *, token: str = "", token_sha256: bytes = b"", client_id: str = "", everything: bool = False
    ) -> int:
        """
        Drop what is cached of a token, a client, or all; questions on their way are not kept.
        """
        if token:
            token_sha256 = sha256(token.encode()).digest()
        return self._cache.drop(token_digest=token_sha256, client_id=client_id, everything=everything)

    def statistics(self) -> dict[str, int]:
        """The cache's counts, introspections on their way, and how many failed."""
        return {**self._cache.statistics(), "asking": len(self._flights), "errors": self.errors}

    async def aclose(self) -> None:
        """
        End the questions that are on their way; their callers are refused.
        """
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    def _judge(self, granted: Granted, scope: str) -> Refusal | None:
        if not has_scope(granted.scope, scope) or (self.client_id and granted.client_id != self.client_id):
            return Refusal(True, f'token missing required scope "{scope}"', f"client {granted.client_id!r}")
        return None

    async def _fly(
        self, key: bytes, digest: bytes, token: str, certificate: bytes, flight: asyncio.Future[Refusal | Granted]
    ) -> None:
        answer: Refusal | Granted = FAILED
        try:
            async with self._room:
                generation = self._cache.generation
                result = await self._introspector.introspect(token, "")
            answer = self._keep(result, key, digest, certificate, generation)
        except Exception as error:  # noqa: BLE001 - whatever went wrong is a denial (I10)
            self.errors += 1
            log.warning("auth_denied", cause=f"introspection failed: {type(error).__name__}: {error}")
        finally:
            del self._flights[key]
            if not flight.done():
                flight.set_result(answer)

    def _keep(
        self, result: IntrospectionResult, key: bytes, digest: bytes, certificate: bytes, generation: int
    ) -> Refusal | Granted:
        wall, monotonic = self._wall(), self._monotonic()
        if generation != self._cache.generation:
            return INACTIVE  # revoked while the answer was on its way: ask again next time
        if not result.active or result.exp <= wall:
            self._cache.store_inactive(key, monotonic, self._negative_ttl_s, generation)
            return INACTIVE
        if not self._cache.bind(digest, certificate, result.exp, wall):
            return BOUND
        granted = Granted(result.client_id, result.scope, result.exp)
        self._cache.store(key, digest, granted, wall, monotonic, self._ttl_s, generation)
        return granted
