"""
How a child is found healthy: a URL that answers 200.

Used for children that end with us; who outlives us (Envoy) has its own probes.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass

import httpx

from clawker_cp.errors import InvalidInput

REQUEST_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """
    Poll `url` every `interval` seconds until it answers 200, at most `timeout` seconds.

    `tls` is used for https. Raises `InvalidInput` at once when the numbers make no sense.
    """

    url: str
    interval: float
    timeout: float
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        if self.interval <= 0 or self.timeout <= 0:
            raise InvalidInput("a health check needs an interval and a timeout above 0 seconds")
        if not self.url.startswith(("http://", "https://")):
            raise InvalidInput(f"a health check needs an http or https URL, not {self.url!r}")

    async def wait(self) -> None:
        """Return at the first 200; raises `TimeoutError` after `timeout`."""
        verify = self.tls if self.tls is not None else True
        async with asyncio.timeout(self.timeout), httpx.AsyncClient(verify=verify, timeout=REQUEST_LIMIT_S) as client:
            while not await self._is_healthy(client):  # noqa: ASYNC110  # another process cannot set our event
                await asyncio.sleep(self.interval)

    async def _is_healthy(self, client: httpx.AsyncClient) -> bool:
        try:
            answer = await client.get(self.url)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200
