"""
Certificates of a running server: renewed before they end, taken over by listeners whoever replaced them.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable
from typing import Protocol

from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock

LOOK_EVERY_S = 5.0
RENEW_EVERY_S = 3600.0


class TreeLike(Protocol):
    """`pki.tree.AuthTree`; called in a thread."""

    def renew(self) -> object: ...


class TokensLike(Protocol):
    """`token_service.TokenBackend`."""

    async def refresh(self) -> None: ...


class InspectionLike(Protocol):
    """`InspectionAuthority`."""

    def next_renewal(self) -> dt.datetime: ...


class CertificateKeeper:
    """
    One per server. The gRPC listeners read their files at each handshake; the token endpoints are told here.

    `reconcile` brings renewed leaves of inspection to the proxy; `up` says whether there is one.
    """

    def __init__(
        self,
        tree: TreeLike,
        tokens: TokensLike,
        inspection: InspectionLike,
        *,
        reconcile: Callable[[], Awaitable[object]],
        up: Callable[[], bool],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._tree = tree
        self._tokens = tokens
        self._inspection = inspection
        self._reconcile = reconcile
        self._up = up
        self._clock = clock

    async def run(self) -> None:
        """
        Look and renew until cancelled.
        """
        renew_at = 0.0
        while True:
            if self._clock.monotonic() >= renew_at:
                renew_at = self._clock.monotonic() + RENEW_EVERY_S
                await asyncio.to_thread(self._tree.renew)
                now = dt.datetime.fromtimestamp(self._clock.wall_ns() / 1e9, dt.UTC)
                if self._up() and self._inspection.next_renewal() <= now:
                    await self._reconcile()
            await self.take_over()
            await self._clock.sleep(LOOK_EVERY_S)

    async def take_over(self) -> None:
        """
        Let the token endpoints use what is in the files now; connections go on.
        """
        await self._tokens.refresh()
