"""
A token authority on loopback ports with the keys of its clients: the embedded one, or the real Hydra behind our front.

The contract's test suite runs against both. Where the real Hydra answers otherwise, `DIFFERS` has its answer, so that
a new version of it shows up.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from clawker_cp.agents.database import Database
from clawker_cp.auth.authority.endpoints import admin_application, public_application
from clawker_cp.auth.authority.keys import signing_key
from clawker_cp.auth.authority.ledger import Ledger
from clawker_cp.auth.authority.service import ASSERTION_TYPE, TokenAuthority
from clawker_cp.auth.clients import register_agent_client, register_cli_client
from clawker_cp.auth.front import HydraFront
from clawker_cp.auth.hydra import ensure_access_token_key
from clawker_cp.auth.ory import write_ory_configs
from clawker_cp.config import CliPorts, CliSettings, Settings
from clawker_cp.processes.health import HealthCheck
from clawker_cp.processes.manager import SubprocessManager
from clawker_cp.runtime.jwk import public_jwk, thumbprint
from clawker_cp.runtime.listeners import HttpListener
from clawker_cp.testing.certificates import TestCa
from clawker_cp.wiring.ory_stack import ENVIRONMENT, migrate

AUDIENCE = "https://127.0.0.1:4444/oauth2/token"
ISSUER = "https://127.0.0.1:4444/"

Reply = tuple[int, str | None]
SERVED: Reply = (200, None)
_MALFORMED: Reply = (400, "invalid_request")
_FAILED: Reply = (500, "error")
# What Hydra 2.3.0 answers instead, by the name of the case: status and `error`.
DIFFERS: dict[str, Reply] = {
    "nothing": _MALFORMED,
    "unknown kid": _MALFORMED,
    "two auds": SERVED,
    "expired": _FAILED,
    "too early": _FAILED,
    "nbf in the future": _FAILED,
    "lives too long": SERVED,
    "no iat": SERVED,
    "too long": SERVED,
    "just ended": _FAILED,
    "just too early": _FAILED,
    "used before": (400, "jti_known"),
    "another grant": _MALFORMED,
    "no assertion": _MALFORMED,
    "wrong assertion type": _MALFORMED,
    "no token": SERVED,  # and inactive
}


@dataclass
class AuthorityWorld:
    """
    What both have in common: keys, assertions, requests. `audience` and `issuer` are those of the implementation.
    """

    directory: Path
    ca: TestCa
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    sandbox: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    now: float = field(default_factory=time.time)
    rate: int = 0
    audience: str = AUDIENCE
    issuer: str = ISSUER
    public_port: int = 0
    admin_port: int = 0
    is_hydra: bool = False

    @asynccontextmanager
    async def running(self, *, register: bool = True) -> AsyncIterator[Any]:
        """Serve, with both clients registered unless told otherwise."""
        async with self.serving(), httpx.AsyncClient(verify=self.tls, trust_env=False, timeout=10) as self.http:
            if register:
                self.registered()
                await register_cli_client(self.admin, self.jwk(), self.tls)
                await register_agent_client(self.admin, self.jwks(), self.tls)
            yield self

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve on `public_port` and `admin_port`."""
        raise NotImplementedError
        yield

    def registered(self) -> None:
        """Say that the clients are being registered, where that has to be said."""

    @property
    def tls(self) -> ssl.SSLContext:
        return self.ca.client_context()

    @property
    def admin(self) -> str:
        return f"https://localhost:{self.admin_port}"

    @property
    def public(self) -> str:
        return f"https://localhost:{self.public_port}"

    def expected(self, case: str, contract: Reply) -> Reply:
        """What this implementation answers, where the contract says `contract`."""
        return DIFFERS.get(case, contract) if self.is_hydra else contract

    def jwk(self) -> str:
        return json.dumps(public_jwk(self.key.public_key()))

    def jwks(self) -> str:
        return json.dumps(
            {"keys": [public_jwk(self.key.public_key()), public_jwk(self.sandbox.public_key(), kid="sandbox")]}
        )

    def claims(self, client: str = "clawker-cli", **changes: Any) -> dict[str, Any]:
        """Good claims with changes; None takes one away."""
        now = int(self.now)
        claims = {
            "iss": client, "sub": client, "aud": self.audience, "jti": str(uuid.uuid4()), "iat": now, "exp": now + 30,
        }  # fmt: skip
        return {key: value for key, value in {**claims, **changes}.items() if value is not None}

    def sign(self, claims: dict[str, Any], *, key: Any = None, algorithm: str = "ES256", **headers: Any) -> str:
        return jwt.encode(claims, key or self.key, algorithm=algorithm, headers=headers)

    def form(self, assertion: str, **changes: str) -> dict[str, str]:
        return {
            "grant_type": "client_credentials",
            "client_assertion_type": ASSERTION_TYPE,
            "client_assertion": assertion,
            "scope": "admin",
            **changes,
        }

    async def post(self, **arguments: Any) -> httpx.Response:
        return await self.http.post(f"{self.public}/oauth2/token", **arguments)

    async def token(self, client: str = "clawker-cli", scope: str = "admin") -> str:
        answer = await self.post(data=self.form(self.sign(self.claims(client)), scope=scope))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    async def introspect(self, **form: str) -> Any:
        return (await self.http.post(f"{self.admin}/admin/oauth2/introspect", data=form)).json()


class EmbeddedWorld(AuthorityWorld):
    """Ours, in this process; its clock is `now`."""

    authority: TokenAuthority

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve on free ports of loopback."""
        database = Database(self.directory / "cp.db")
        database.open()
        key = signing_key(self.directory / "token-signing.key")
        ledger = Ledger(database)
        ledger.load(self.now)
        jwk = public_jwk(key.public_key())
        self.authority = TokenAuthority(
            key, thumbprint(jwk), ledger, issuer=self.issuer, audience=self.audience, exchanges_per_s=self.rate,
            wall=lambda: self.now,
        )  # fmt: skip
        jwks = {"keys": [{**jwk, "kid": thumbprint(jwk)}]}
        public = HttpListener("token", public_application(self.authority, jwks), [("127.0.0.1", 0)])
        admin = HttpListener("admin", admin_application(self.authority), [("127.0.0.1", 0)])
        public.open()
        admin.open()
        self.public_port, self.admin_port = public.ports[0], admin.ports[0]
        context = self.ca.server_context()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(public.run(context))
                group.create_task(admin.run(context))
                try:
                    yield
                finally:
                    public.close()
                    admin.close()
        finally:
            database.close()


@dataclass
class HydraWorld(AuthorityWorld):
    """The real Hydra behind our front, with the configuration our server writes."""

    binary: Path = Path("hydra")
    is_hydra: bool = True

    def registered(self) -> None:
        """Let the front through."""
        self.front.ready = True

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve on free ports of loopback; Hydra's own files are below `directory`."""
        behind, self.admin_port, self.public_port = free_ports(3)
        ports = CliPorts(hydra_public_port=self.public_port, hydra_admin_port=self.admin_port)
        settings = msgspec.structs.replace(Settings(), cli=CliSettings(control_plane=ports))
        self.issuer = f"https://127.0.0.1:{self.public_port}/"
        self.audience = f"{self.issuer}oauth2/token"
        pair = self.ca.server()
        configs = write_ory_configs(
            settings, "0" * 64, self.directory / "ory", certificate=pair.certificate, key=pair.key, behind_port=behind
        )
        await migrate(str(self.binary), configs.dsn)
        self.front = front = HydraFront(f"https://127.0.0.1:{behind}", self.tls, exchanges_per_s=self.rate)
        public = HttpListener("token", front.application(), [("127.0.0.1", self.public_port)])
        async with SubprocessManager() as children:
            command = [str(self.binary), "serve", "all", "--sqa-opt-out", "--config", str(configs.hydra)]
            await children.start("hydra", command, env=ENVIRONMENT, cwd="/")
            for port in (behind, self.admin_port):
                url = f"https://127.0.0.1:{port}/health/alive"
                await children.wait_healthy("hydra", HealthCheck(url, 0.05, 30, self.tls))
            await ensure_access_token_key(self.admin, self.tls)
            public.open()
            async with asyncio.TaskGroup() as group:
                group.create_task(public.run(self.ca.server_context()))
                try:
                    yield
                finally:
                    public.close()
            await front.aclose()


def free_ports(count: int) -> list[int]:
    """
    Ports of loopback that nobody has now.
    """
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()
