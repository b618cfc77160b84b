"""
Readiness: what `/healthz` answers, and who waits for the end of the start.

Ready is said once, after children, kernel side and servers are up. From then on `/healthz` asks the
probes, now or at most two seconds ago; before, and after a failed start, it says so.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import orjson

from clawker_cp.config import PROBE_LIMIT_S, Settings
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.health import Component, Probe, Probes

Answer = tuple[int, bytes]
JSON = "application/json"


class CPStartupOrchestrator:
    """
    Holds readiness and the aggregate probes. Construction does nothing; used on the loop only.
    """

    def __init__(self, *, components: Callable[[], Iterable[Component]] = tuple, clock: Clock = SYSTEM_CLOCK) -> None:
        self._components = components
        self._clock = clock
        self._probes = Probes((), clock)
        self._ready = False
        self._failure = ""
        self._decided = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether the start is over and went well."""
        return self._ready

    def set_service_probes(
        self,
        settings: Settings,
        tls: ssl.SSLContext,
        more: Sequence[tuple[str, Probe]] = (),
        *,
        ory: Sequence[str] = (),
    ) -> None:
        """
        Set what `/healthz` asks, in the order of the contract: the token endpoints, the Ory children that run beside
        Hydra (`kratos`, `oathkeeper`), then `more` (the gRPC listeners; enforcement, dns, envoy while the firewall is
        on).

        `tls` is what a client of the token endpoints trusts.
        """
        control = settings.cli.control_plane
        ports = [("hydra-public", control.hydra_public_port), ("hydra-admin", control.hydra_admin_port)]
        if "kratos" in ory:
            ports += [
                ("kratos-public", settings.ory.kratos_public_port),
                ("kratos-admin", settings.ory.kratos_admin_port),
            ]
        if "oathkeeper" in ory:
            ports += [
                ("oathkeeper-proxy", settings.ory.oathkeeper_proxy_port),
                ("oathkeeper-api", settings.ory.oathkeeper_api_port),
            ]
        dials: list[tuple[str, Probe]] = [(name, partial(tls_answers, "127.0.0.1", port, tls)) for name, port in ports]
        self._probes = Probes([*dials, *more], self._clock)

    def set_ready(self) -> None:
        """
        Say that everything is up. Later calls change nothing.
        """
        if not self._failure:
            self._ready = True
            self._decided.set()

    def set_failed(self, why: str) -> None:
        """
        Say that the start failed; whoever waits for its outcome hears why. Too late once ready.
        """
        if not self._ready:
            self._failure = why or "the control plane could not start"
            self._decided.set()

    async def wait_outcome(self) -> str:
        """
        Wait for the end of the start: "" when ready, else why it failed.
        """
        await self._decided.wait()
        return self._failure

    async def healthz_handler(self, *, verbose: bool = False) -> Answer:
        """
        Status and JSON body of `GET /healthz` (contract 10.3); 200 only when ready and every probe passes now.
        """
        if not self._ready:
            return self._answer(503, {"status": "not_ready"}, verbose)
        failed = await self._probes.failed()
        if failed:
            return self._answer(503, {"status": "unhealthy", "failed_probe": failed}, verbose)
        return self._answer(200, {"status": "healthy"}, verbose)

    def _answer(self, status: int, body: dict[str, Any], verbose: bool) -> Answer:
        if verbose:
            body["components"] = {
                one.name: {
                    "implementation": one.implementation,
                    "version": one.version,
                    "health": f"HEALTH_{one.health.name}",
                    "detail": one.detail,
                    "since_unix": one.since_unix,
                    "critical": one.critical,
                    "restarts": one.restarts,
                }
                for one in self._components()
            }
        return status, orjson.dumps(body)


async def tls_answers(host: str, port: int, tls: ssl.SSLContext) -> bool:
    """
    Whether a TLS server that `tls` trusts answers at an address.
    """
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            _, writer = await asyncio.open_connection(host, port, ssl=tls, server_hostname="localhost")
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
