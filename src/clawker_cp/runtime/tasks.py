"""
Supervised tasks: a part that fails is reported, retried with back-off, and never takes others along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()

RETRY_MIN_S, RETRY_MAX_S = 0.5, 30.0


async def supervise(name: str, factory: Callable[[], Awaitable[None]], *, blast_radius: str) -> None:
    """
    Run a part until it returns; a failure logs `<name>_unavailable` and starts it again after a pause.

    Cancelling ends it. The pause doubles to `RETRY_MAX_S`.
    """
    pause = RETRY_MIN_S
    failed = False
    while True:
        try:
            if failed:
                log.info(f"{name}_recovered")
            await factory()
        except Exception as error:
            log.exception(f"{name}_unavailable", cause=str(error), blast_radius=blast_radius, retry_s=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_MAX_S)
            failed = True
        else:
            return
