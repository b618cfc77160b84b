"""
Everything that others call: gRPC over mTLS, the token endpoints, `/healthz`, `/metrics`.

Built from handlers that the application passes in. Opened early, so that a start can be watched; until
ready only the boot methods answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog

from clawker_cp.agents.database import Database
from clawker_cp.agents.identity import Resolver
from clawker_cp.auth.authorizer import QUESTIONS_AT_ONCE
from clawker_cp.auth.scopes import (
    AGENT_CLIENT,
    CLI_CLIENT,
    admin_method_scopes,
    agent_method_scopes,
    control_method_scopes,
    health_method_scopes,
)
from clawker_cp.config import Directories, Settings
from clawker_cp.errors import ClawkerError, Unavailable
from clawker_cp.pki.material import ListenerMaterial
from clawker_cp.pki.tree import AuthTree
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.interceptors.identity import IdentityInterceptor
from clawker_cp.rpc.limits import AGENT_LIMITS
from clawker_cp.rpc.server import RpcServer
from clawker_cp.rpc.services import HealthService, Register, admin_service, agent_service, control_service
from clawker_cp.rpc.tls import TlsMaterial
from clawker_cp.runtime.asgi import Answer, Application, Request
from clawker_cp.runtime.listeners import HttpListener
from clawker_cp.runtime.startup import CPStartupOrchestrator
from clawker_cp.telemetry.metrics import CONTENT_TYPE, Metrics
from clawker_cp.wiring.ory_stack import token_backend
from clawker_cp.wiring.placement import Listeners

log = structlog.get_logger()

LOOPBACK = "127.0.0.1"
CLOSE_LIMIT_S = 5.0
LOOK_EVERY_S = 2.0


class ControlSurface:
    """
    The listeners of one server, at the addresses of `listen`.
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
        listen: Listeners,
    ) -> None:
        self._settings = settings
        self._tree = tree
        self._startup = startup
        self._metrics = metrics
        self._material = ListenerMaterial(tree)
        controlplane = directories.data / "controlplane"
        self.tokens = token_backend(settings, controlplane, tree, database, listen.tokens)
        ports = settings.cli.control_plane
        self._health = HttpListener(
            "health",
            Application({("/healthz", "GET"): self._healthz}),
            [(host, ports.health_port) for host in listen.health],
        )
        self._scrape = HttpListener(
            "metrics",
            Application({("/metrics", "GET"): self._render}),
            [(host, settings.metrics_port) for host in listen.metrics],
        )
        self._bound = listen
        self._auths: list[AuthInterceptor] = []
        self._listeners: list[tuple[RpcServer, HealthService]] = []
        self._lost: asyncio.Queue[ClawkerError] = asyncio.Queue()
        self._closing = False

    def make_auths(self) -> Sequence[AuthInterceptor]:
        """
        The interceptors of both listeners, whose caches a revocation has to reach.

        Operators: the CLI's certificate and client. Agents: their client; who they are is the identity
        interceptor's business. Both share the bound of questions asked at once.
        """
        room = asyncio.Semaphore(QUESTIONS_AT_ONCE)
        operators = self._make_auth({**admin_method_scopes(), **control_method_scopes()}, CLI_CLIENT, room)
        agents = self._make_auth(agent_method_scopes(), AGENT_CLIENT, room)
        self._auths = [operators.require_common_name(CLI_CLIENT), agents]
        return tuple(self._auths)

    def _make_auth(self, scopes: Mapping[str, str], client: str, room: asyncio.Semaphore) -> AuthInterceptor:
        oauth = self._settings.oauth
        return AuthInterceptor(
            self.tokens.introspector,
            {**scopes, **health_method_scopes()},
            ttl_s=oauth.cache_ttl_s,
            negative_ttl_s=oauth.negative_ttl_s,
            bars=self.tokens.bars,
            room=room,
            observe=self._metrics.observe_auth,
        ).require_client_id(client)

    def auth_counts(self) -> Mapping[str, int]:
        """
        What the interceptors of both listeners counted, together.
        """
        total: Counter[str] = Counter()
        for auth in self._auths:
            total.update(auth.statistics())
        return total

    def token_counts(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """
        Tokens issued by client, and refused by error.
        """
        return self.tokens.tally.issued, self.tokens.tally.refused

    async def open(self, group: asyncio.TaskGroup, admin: Any, control: Any, agents: Any, resolver: Resolver) -> None:
        """
        Bind and serve everything. Raises `Conflict` or `Unavailable` naming the port that cannot be had.

        `admin`, `control` and `agents` are the servicers; `resolver` knows who has which address.
        """
        self._health.open()
        self._scrape.open()
        self.tokens.open()
        ports = self._settings.cli.control_plane
        operators, agents_auth = self._auths
        names = ("clawker.admin.v1.AdminService", "clawker.control.v1.ControlService")
        services = [admin_service(admin), control_service(control)]
        self._add(
            "admin", [f"{host}:{ports.admin_port}" for host in self._bound.admin], operators, services, names,
            is_ready=lambda: self._startup.is_ready,
        )  # fmt: skip
        agents_at = [f"{host}:{ports.agent_port}" for host in self._bound.agents]
        self._add(
            "agents", agents_at, agents_auth, [agent_service(agents)],
            ("clawker.agent.v1.AgentService",), identity=[IdentityInterceptor(resolver)], limits=AGENT_LIMITS,
        )  # fmt: skip
        group.create_task(self._follow("health", self._health.run()), name="health-listener")
        group.create_task(self._follow("metrics", self._scrape.run()), name="metrics-listener")
        await self.tokens.start(group)
        for listener, health in self._listeners:
            await listener.start()
            group.create_task(self._follow(listener.name, listener.wait_stopped()), name=f"{listener.name}-listener")
            await health.serve()
        await self.tokens.register_clients()
        self.probe_also(())

    def _add(
        self,
        name: str,
        addresses: Sequence[str],
        auth: AuthInterceptor,
        services: list[Register],
        names: Sequence[str],
        **more: Any,
    ) -> None:
        health = HealthService(names)
        listener = RpcServer(
            name, addresses, self._tls, auth, [*services, health], observe=self._metrics.count_rpc, **more
        )
        self._listeners.append((listener, health))

    def probe_also(self, probes: Sequence[tuple[str, Callable[[], Any]]]) -> None:
        """
        Add what `/healthz` asks once the firewall is on: enforcement, dns, envoy.
        """
        self._startup.set_service_probes(
            self._settings,
            self._material.client_context(),
            [("grpc-admin", self._admin_answers), ("grpc-agent", self._agents_answer), *probes],
            ory=self.tokens.children,
        )

    async def _follow(self, name: str, serving: Awaitable[None]) -> None:
        """Report a listener that ends although nobody closed it."""
        cause = "it ended"
        try:
            await serving
        except (OSError, RuntimeError, ClawkerError) as error:
            cause = f"{type(error).__name__}: {error}"
        if not self._closing:
            self._report_lost(name, cause)

    async def wait_broken(self) -> None:
        """
        Wait until a child or a listener is lost that cannot be brought back, and say so.
        """
        async with asyncio.TaskGroup() as group:
            waits = {
                "cp_child_lost": group.create_task(self.tokens.wait_crash(), name="child-crash"),
                "cp_listener_lost": group.create_task(self.wait_lost(), name="listener-lost"),
            }
            ended, _ = await asyncio.wait(waits.values(), return_when=asyncio.FIRST_COMPLETED)
            for event, task in waits.items():
                if task in ended:
                    log.error(event, cause=str(task.result()), effect="draining; enforcement stays as it is")
                task.cancel()

    async def wait_lost(self) -> ClawkerError:
        """
        Wait until a listener is gone that nobody closed.

        One that ended says so; one whose socket no longer listens, which nobody tells us, refuses connections.
        """
        ports = self._settings.cli.control_plane
        places = [
            ("admin", LOOPBACK, ports.admin_port),
            ("agents", self._bound.probe_agents, ports.agent_port),
            ("health", LOOPBACK, ports.health_port),
            ("metrics", LOOPBACK, self._settings.metrics_port),
            ("token", LOOPBACK, ports.hydra_public_port),
        ]
        refused: set[str] = set()
        while self._lost.empty():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    return await self._lost.get()
            again = {name for name, host, port in places if await _refuses(host, port)}
            for name in sorted(again & refused):
                self._report_lost(name, "its socket refuses connections")
            refused = again
        return self._lost.get_nowait()

    def _report_lost(self, name: str, cause: str) -> None:
        log.error("grpc_serve_panic" if name in {"admin", "agents"} else "cp_serve_failed", listener=name, cause=cause)
        self._lost.put_nowait(Unavailable(f"the {name} listener is lost: {cause}"))

    async def tell(self, failed: str) -> None:
        """
        Let gRPC health say of both listeners whether a critical component has failed.
        """
        for _, health in self._listeners:
            await health.tell(healthy=not failed)

    async def close(self) -> None:
        """
        Take no new calls, finish those in flight within a bound, stop listening. Fine to call again.
        """
        self._closing = True
        async with asyncio.TaskGroup() as group:
            for listener, health in self._listeners:
                await health.leave()
                group.create_task(listener.stop(CLOSE_LIMIT_S), name=f"{listener.name}-stop")
        self.tokens.close()
        self._health.close()
        self._scrape.close()

    async def _admin_answers(self) -> bool:
        port = self._settings.cli.control_plane.admin_port
        return await _accepts(LOOPBACK, port, self._material.client_context())

    async def _agents_answer(self) -> bool:
        port = self._settings.cli.control_plane.agent_port
        return await _accepts(self._bound.probe_agents, port, self._material.client_context())

    async def _healthz(self, request: Request) -> Answer:
        verbose = request.query.get("verbose", [""])[0] not in {"", "0"}
        status, body = await self._startup.healthz_handler(verbose=verbose)
        return Answer(status, body, {"Content-Type": "application/json"})

    async def _render(self, _: Request) -> Answer:
        return Answer(200, self._metrics.render(), {"Content-Type": CONTENT_TYPE})

    def _tls(self) -> TlsMaterial:
        material = self._material.read()
        return TlsMaterial(material.certificate_pem, material.key_pem, material.ca_pem)


async def _refuses(host: str, port: int) -> bool:
    """Whether nothing listens: what is merely busy does not refuse."""
    try:
        async with asyncio.timeout(LOOK_EVERY_S):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


async def _accepts(host: str, port: int, tls: ssl.SSLContext) -> bool:
    """Whether something that has our certificate listens; what it wants of us in return is not tried."""
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=tls, server_hostname="localhost")
    except (OSError, asyncio.IncompleteReadError):
        return False
    writer.close()
    return True
