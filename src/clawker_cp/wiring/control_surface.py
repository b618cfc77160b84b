"""
Everything that others call: gRPC over mTLS, the token endpoints, `/healthz`, `/metrics`.

Built from handlers that the application passes in. Opened early, so that a start can be watched; until
ready only the boot methods answer.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from clawker_cp.agents.database import Database
from clawker_cp.auth.scopes import CLI_CLIENT, admin_method_scopes, control_method_scopes
from clawker_cp.config import Directories, Settings
from clawker_cp.pki.material import ListenerMaterial
from clawker_cp.pki.tree import AuthTree
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.server import RpcServer
from clawker_cp.rpc.services import admin_service, control_service
from clawker_cp.rpc.tls import TlsMaterial
from clawker_cp.runtime.asgi import Answer, Application, Request
from clawker_cp.runtime.listeners import HttpListener
from clawker_cp.runtime.startup import CPStartupOrchestrator
from clawker_cp.telemetry.metrics import CONTENT_TYPE, Metrics
from clawker_cp.wiring.ory_stack import token_backend

log = structlog.get_logger()

LOOPBACK = "127.0.0.1"
CLOSE_LIMIT_S = 5.0


class ControlSurface:
    """
    The listeners of one server. `admin` and `control` are the servicers.
    """

    def __init__(
        self,
        settings: Settings,
        directories: Directories,
        tree: AuthTree,
        database: Database,
        startup: CPStartupOrchestrator,
        metrics: Metrics,
        *,
        gateway: str,
    ) -> None:
        self._settings = settings
        self._tree = tree
        self._startup = startup
        self._metrics = metrics
        self._material = ListenerMaterial(tree)
        controlplane = directories.data / "controlplane"
        self.tokens = token_backend(settings, controlplane, tree, database, (LOOPBACK, gateway))
        ports = settings.cli.control_plane
        self._health = HttpListener(
            "health",
            Application({("/healthz", "GET"): self._healthz}),
            [(LOOPBACK, ports.health_port), (gateway, ports.health_port)],
        )
        self._scrape = HttpListener(
            "metrics", Application({("/metrics", "GET"): self._render}), [(LOOPBACK, settings.metrics_port)]
        )
        self._rpc: RpcServer | None = None
        self.auth: AuthInterceptor | None = None

    def make_auth(self) -> AuthInterceptor:
        """
        The interceptor of the admin listener: the CLI's certificate, its client, the scope of each method.
        """
        oauth = self._settings.oauth
        self.auth = (
            AuthInterceptor(
                self.tokens.introspector,
                {**admin_method_scopes(), **control_method_scopes()},
                ttl_s=oauth.cache_ttl_s,
                negative_ttl_s=oauth.negative_ttl_s,
                bars=self.tokens.bars,
            )
            .require_client_id(CLI_CLIENT)
            .require_common_name(CLI_CLIENT)
        )
        return self.auth

    async def open(self, group: asyncio.TaskGroup, admin: Any, control: Any) -> None:
        """
        Bind and serve everything. Raises `Conflict` or `Unavailable` naming the port that cannot be had.
        """
        self._health.open()
        self._scrape.open()
        self.tokens.open()
        ports = self._settings.cli.control_plane
        assert self.auth is not None
        self._rpc = RpcServer(
            "admin",
            [f"{LOOPBACK}:{ports.admin_port}"],
            self._tls,
            self.auth,
            [admin_service(admin), control_service(control)],
            is_ready=lambda: self._startup.is_ready,
            observe=self._metrics.count_rpc,
        )
        group.create_task(self._health.run(), name="health-listener")
        group.create_task(self._scrape.run(), name="metrics-listener")
        await self.tokens.start(group)
        await self._rpc.start()
        await self.tokens.register_clients()
        self.probe_also(())

    def probe_also(self, probes: Sequence[tuple[str, Callable[[], Any]]]) -> None:
        """
        Add what `/healthz` asks once the firewall is on: enforcement, dns, envoy.
        """
        self._startup.set_service_probes(
            self._settings,
            self._material.client_context(),
            [("grpc-admin", self._admin_answers), *probes],
            ory=self.tokens.children,
        )

    async def close(self) -> None:
        """
        Take no new calls, finish those in flight within a bound, stop listening.
        """
        if self._rpc is not None:
            await self._rpc.stop(CLOSE_LIMIT_S)
        self.tokens.close()
        self._health.close()
        self._scrape.close()

    def release(self) -> None:
        """
        Give back what was bound by a start that failed.
        """
        self.tokens.close()
        self._health.close()
        self._scrape.close()

    async def _admin_answers(self) -> bool:
        port = self._settings.cli.control_plane.admin_port
        return await _accepts(LOOPBACK, port, self._material.client_context())

    async def _healthz(self, request: Request) -> Answer:
        verbose = request.query.get("verbose", [""])[0] not in {"", "0"}
        status, body = await self._startup.healthz_handler(verbose=verbose)
        return Answer(status, body, {"Content-Type": "application/json"})

    async def _render(self, _: Request) -> Answer:
        return Answer(200, self._metrics.render(), {"Content-Type": CONTENT_TYPE})

    def _tls(self) -> TlsMaterial:
        material = self._material.read()
        return TlsMaterial(material.certificate_pem, material.key_pem, material.ca_pem)


async def _accepts(host: str, port: int, tls: ssl.SSLContext) -> bool:
    """Whether something that has our certificate listens; what it wants of us in return is not tried."""
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=tls, server_hostname="localhost")
    except (OSError, asyncio.IncompleteReadError):
        return False
    writer.close()
    return True
