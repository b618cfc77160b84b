"""
Envoy's admin interface over its UNIX socket: what it has taken, what it refused, whether it is live.

The socket's directory is closed to everybody else; no TCP admin port exists (D2).
"""

from __future__ import annotations

from pathlib import Path

import httpx

from clawker_cp.errors import Unavailable

REQUEST_LIMIT_S = 5.0


class EnvoyAdmin:
    """Asks the running Envoy; every request is bounded. Raises `Unavailable` while it is down."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._client: httpx.AsyncClient | None = None

    def _connection(self) -> httpx.AsyncClient:
        if self._client is None:
            transport = httpx.AsyncHTTPTransport(uds=str(self._socket))
            self._client = httpx.AsyncClient(transport=transport, base_url="http://envoy", timeout=REQUEST_LIMIT_S)
        return self._client

    async def aclose(self) -> None:
        """Close the connection; the next question opens one again."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def is_live(self) -> bool:
        """Return whether Envoy answers and has loaded its first configuration."""
        try:
            answer = await self._connection().get("/ready")
        except httpx.HTTPError:
            return False
        return answer.status_code == 200 and "LIVE" in answer.text

    async def statistics(self, pattern: str) -> dict[str, str]:
        """Return the statistics whose name matches a regular expression, values as text."""
        try:
            answer = await self._connection().get("/stats", params={"filter": pattern})
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise Unavailable(
                f"Envoy does not answer on its admin socket: {error!r}", code="STACK_PROBE",
                hint="`clawkerctl status` says whether it lives; try again",
            ) from error  # fmt: skip
        pairs = (line.partition(": ") for line in answer.text.splitlines())
        return {name: value.strip('"') for name, _, value in pairs}

    async def reopen_logs(self) -> None:
        """Make Envoy open its log files anew, after they were renamed."""
        try:
            (await self._connection().post("/reopen_logs")).raise_for_status()
        except httpx.HTTPError as error:
            raise Unavailable(f"Envoy did not reopen its logs: {error!r}") from error
