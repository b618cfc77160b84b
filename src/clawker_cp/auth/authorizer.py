"""
May this call pass: token, certificate, scope, client; cached, one question at a time per token.

`decide` answers from the cache without awaiting (the hot path); `ask` introspects. Both deny on anything
unexpected (I10), and say why in the refusal: who turns it into an answer logs it. Used on the loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol

from clawker_cp.accel import Granted, TokenCache, has_scope
from clawker_cp.auth.introspect import IntrospectionResult, Introspector
from clawker_cp.errors import ClawkerError

QUESTIONS_AT_ONCE = 64
# Beyond these a question is refused instead of queued: every one of them holds a token of up to 8 KiB, and
# one agent must not be able to fill the queue of all others.
QUESTIONS_WAITING = 1024
QUESTIONS_PER_CERTIFICATE = 256
# An introspector has its own limit of 5 s; this one is for those that forget it.
ANSWER_LIMIT_S = 6.0
WAIT_LIMIT_S = 12.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call may not pass: a category of `errors` and the caller's message (contract 5.1)."""

    authenticated: bool  # False = UNAUTHENTICATED, True = PERMISSION_DENIED
    message: str
    cause: str = ""  # for the log only


FAILED = Refusal(False, "token validation failed", "introspection failed")
INACTIVE = Refusal(False, "token inactive or invalid")
BOUND = Refusal(True, "token bound to another certificate")


@dataclass(frozen=True, slots=True)
class Pending:
    """Nothing is known of the token: `ask` has to."""

    key: bytes


class Bars(Protocol):
    """The bar list of revoked tokens (contract 3.7), for authorities that do not know it themselves."""

    def barred(self, token_sha256: bytes, client_id: str, exp: int) -> bool:
        """Whether an active token was revoked here; `exp` tells when it was issued. Must not block."""
        ...


class _Flight:
    """One question on its way, or waiting for its turn."""

    __slots__ = ("answer", "callers", "certificate")

    def __init__(self, certificate: bytes) -> None:
        self.answer: asyncio.Future[Refusal | Granted] = asyncio.get_running_loop().create_future()
        self.callers = 0
        self.certificate = certificate


class Authorizer:
    """
    Judges tokens for one listener. `client_id` pins whose tokens count, "" = anybody's with the scope.

    `room` bounds the questions asked at once; listeners that ask the same authority share one.
    """

    def __init__(
        self,
        introspector: Introspector,
        *,
        cache: TokenCache | None = None,
        client_id: str = "",
        ttl_s: float = 10.0,
        negative_ttl_s: float = 1.0,
        bars: Bars | None = None,
        room: asyncio.Semaphore | None = None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._introspector = introspector
        self._cache = TokenCache() if cache is None else cache
        self.client_id = client_id
        self._ttl_s = ttl_s
        self._negative_ttl_s = negative_ttl_s
        self._bars = bars
        self._wall = wall
        self._monotonic = monotonic
        self._flights: dict[bytes, _Flight] = {}
        self._waiting_of: Counter[bytes] = Counter()
        self._room = asyncio.Semaphore(QUESTIONS_AT_ONCE) if room is None else room
        self._tasks: set[asyncio.Task[None]] = set()
        self.errors = 0
        self.overloads = 0

    def decide(self, token: str, certificate: bytes, scope: str) -> Refusal | Pending | None:
        """
        Judge from the cache: None = may pass, `Pending` = has to be asked. `certificate` is SHA-256 of the DER.
        """
        found = self._cache.find(certificate, token, self._wall(), self._monotonic())
        if found is True:
            return Pending(self._cache.key(certificate, token.encode()))
        return INACTIVE if found is False else self._judge(found, scope)  # type: ignore[arg-type]

    async def ask(self, pending: Pending, token: str, certificate: bytes, scope: str) -> Refusal | None:
        """
        Introspect, keep the answer, judge. Callers of one token share one question; a caller that goes
        away does not cancel it, but a question nobody waits for any more is not begun.
        """
        digest = sha256(token.encode()).digest()
        if not self._cache.owns(digest, certificate, self._wall()):
            return BOUND
        flight = self._flights.get(pending.key)
        if flight is None:
            if (
                len(self._flights) >= QUESTIONS_AT_ONCE + QUESTIONS_WAITING
                or self._waiting_of[certificate] >= QUESTIONS_PER_CERTIFICATE
            ):
                self.overloads += 1
                return replace(FAILED, cause="too many introspections are waiting")
            flight = self._begin(pending.key, digest, token, certificate)
        flight.callers += 1
        try:
            async with asyncio.timeout(WAIT_LIMIT_S):
                answer = await asyncio.shield(flight.answer)
        except TimeoutError:
            return replace(FAILED, cause=f"no answer within {WAIT_LIMIT_S:g} s")
        finally:
            flight.callers -= 1
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
        """The cache's counts; questions on their way, who waits for them, how many failed, how many were not taken."""
        return {
            **self._cache.statistics(),
            "asking": len(self._flights),
            "waiting": sum(flight.callers for flight in self._flights.values()),
            "errors": self.errors,
            "overloads": self.overloads,
        }

    async def aclose(self) -> None:
        """
        End the questions that are on their way; their callers are refused.
        """
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    def _judge(self, granted: Granted, scope: str) -> Refusal | None:
        client_id, held, _ = granted
        if has_scope(held, scope) and (not self.client_id or client_id == self.client_id):
            return None
        return Refusal(True, f'token missing required scope "{scope}"', f"client {client_id!r}")

    def _begin(self, key: bytes, digest: bytes, token: str, certificate: bytes) -> _Flight:
        flight = self._flights[key] = _Flight(certificate)
        self._waiting_of[certificate] += 1
        # Owned by this object, ended by `aclose`: a task of a caller's group would end with that caller.
        task = asyncio.get_running_loop().create_task(self._fly(flight, key, digest, token), name="introspect")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task cancelled before its first step runs none of its `finally`.
        task.add_done_callback(lambda _: self._land(flight, key, FAILED))
        return flight

    def _land(self, flight: _Flight, key: bytes, answer: Refusal | Granted) -> None:
        if flight.answer.done():
            return
        flight.answer.set_result(answer)
        del self._flights[key]
        self._waiting_of[flight.certificate] -= 1
        if not self._waiting_of[flight.certificate]:
            del self._waiting_of[flight.certificate]

    async def _fly(self, flight: _Flight, key: bytes, digest: bytes, token: str) -> None:
        answer: Refusal | Granted = FAILED
        try:
            async with self._room:
                if not flight.callers:
                    return
                generation = self._cache.generation
                async with asyncio.timeout(ANSWER_LIMIT_S):
                    result = await self._introspector.introspect(token, "")
            answer = self._keep(result, key, digest, flight.certificate, generation)
        except Exception as error:  # noqa: BLE001 - whatever went wrong is a denial (I10)
            self.errors += 1
            # Only our own messages are known to hold no token (I11).
            said = f": {error.message}" if isinstance(error, ClawkerError) else ""
            answer = replace(FAILED, cause=f"introspection failed: {type(error).__name__}{said}")
        finally:
            self._land(flight, key, answer)

    def _keep(
        self, result: IntrospectionResult, key: bytes, digest: bytes, certificate: bytes, generation: int
    ) -> Refusal | Granted:
        wall, monotonic = self._wall(), self._monotonic()
        if generation != self._cache.generation:
            return INACTIVE  # revoked while the answer was on its way: ask again next time
        barred = self._bars is not None and result.active and self._bars.barred(digest, result.client_id, result.exp)
        if not result.active or result.exp <= wall or barred:
            self._cache.store_inactive(key, monotonic, self._negative_ttl_s, generation)
            return INACTIVE
        if not self._cache.bind(digest, certificate, result.exp, wall):
            return BOUND
        granted = Granted(result.client_id, result.scope, result.exp)
        self._cache.store(key, digest, granted, wall, monotonic, self._ttl_s, generation)
        return granted
