"""
The token authority of this server as one object: the embedded one here, the real Hydra in `ory_stack`.

Both are loaded, opened, started, asked and closed in the same way; `control_surface` picks one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import structlog

from clawker_cp.agents.database import Database
from clawker_cp.auth.authority.endpoints import admin_application, public_application
from clawker_cp.auth.authority.keys import signing_key
from clawker_cp.auth.authority.ledger import Ledger
from clawker_cp.auth.authority.service import TokenAuthority
from clawker_cp.auth.authorizer import Bars
from clawker_cp.auth.clients import register_agent_client, register_cli_client
from clawker_cp.auth.introspect import Introspector
from clawker_cp.auth.tally import TokenTally
from clawker_cp.config import Settings
from clawker_cp.errors import ClawkerError
from clawker_cp.pki.material import ListenerMaterial
from clawker_cp.pki.tree import SIGNING_JWK, AuthTree
from clawker_cp.runtime.jwk import public_jwk, read_jwks, thumbprint
from clawker_cp.runtime.listeners import HttpListener
from clawker_cp.runtime.startup import tls_answers
from clawker_cp.wiring.agent_view import Bar

log = structlog.get_logger()

LOOPBACK = "127.0.0.1"
SANDBOX_KID = "sandbox"


class TokenBackend(Protocol):
    """
    Who gives tokens out and says what they are worth.
    """

    @property
    def implementation(self) -> str:
        """`embedded` or `hydra`."""
        ...

    @property
    def children(self) -> Sequence[str]:
        """Ory servers that run beside it: `kratos`, `oathkeeper`."""
        ...

    @property
    def introspector(self) -> Introspector:
        """Says what a token is worth."""
        ...

    @property
    def bars(self) -> Bars | None:
        """The bar list, for an authority that does not know it."""
        ...

    @property
    def revocation(self) -> Bar:
        """Bars tokens, durably."""
        ...

    @property
    def tally(self) -> TokenTally:
        """How many tokens were given and refused."""
        ...

    def load(self, now: float) -> None:
        """Read and write the files. Blocks for the disk."""
        ...

    def open(self) -> None:
        """Bind the listeners. Raises `Conflict` naming the port that is taken."""
        ...

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Serve on what was bound; returns when clients can be registered."""
        ...

    async def register_clients(self) -> None:
        """Make sure that the CLI's and the agents' clients exist."""
        ...

    async def refresh(self) -> None:
        """Take over a renewed certificate; connections go on."""
        ...

    async def answers(self) -> bool:
        """Whether the public endpoint answers now."""
        ...

    async def wait_crash(self) -> ClawkerError:
        """Wait until a part is lost that cannot be brought back."""
        ...

    def close(self) -> None:
        """Stop serving. Children run until `supervised` is left; from here on their end is expected."""
        ...

    def supervised(self) -> AbstractAsyncContextManager[object]:
        """Entered before `start`; left at the very end of a drain, which ends the children."""
        ...


class EmbeddedTokens:
    """
    The embedded authority with its files and listeners. Fulfils `TokenBackend`.
    """

    implementation = "embedded"
    children: tuple[str, ...] = ()

    def __init__(
        self, settings: Settings, directory: Path, tree: AuthTree, database: Database, addresses: Sequence[str]
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._tree = tree
        self._database = database
        self._addresses = tuple(addresses)
        self._material = ListenerMaterial(tree)
        self._listeners: list[HttpListener] = []
        self._authority: TokenAuthority | None = None

    @property
    def introspector(self) -> TokenAuthority:
        """The authority itself."""
        assert self._authority is not None
        return self._authority

    @property
    def bars(self) -> None:
        """None: it knows what was revoked."""
        return

    @property
    def tally(self) -> TokenTally:
        """The authority's."""
        return self.introspector.tally

    @property
    def revocation(self) -> TokenAuthority:
        """The authority itself."""
        return self.introspector

    def load(self, now: float) -> None:
        """
        Read the signing key and what was spent and revoked. Blocks for the disk.
        """
        ports = self._settings.cli.control_plane
        key = signing_key(self._directory / "token-signing.key")
        jwk = public_jwk(key.public_key())
        kid = thumbprint(jwk)
        ledger = Ledger(self._database)
        ledger.load(now)
        base = f"https://{LOOPBACK}:{ports.hydra_public_port}/"
        self._authority = TokenAuthority(
            key,
            kid,
            ledger,
            issuer=base,
            audience=f"{base}oauth2/token",
            exchanges_per_s=self._settings.oauth.exchanges_per_s,
        )
        public = public_application(self._authority, {"keys": [{**jwk, "kid": kid}]})
        self._listeners = [
            HttpListener("token endpoint", public, [(host, ports.hydra_public_port) for host in self._addresses]),
            HttpListener("token admin", admin_application(self._authority), [(LOOPBACK, ports.hydra_admin_port)]),
        ]

    def open(self) -> None:
        """
        Bind the listeners. Raises `Conflict` naming the port that is taken.
        """
        for listener in self._listeners:
            listener.open()

    async def start(self, group: asyncio.TaskGroup) -> None:
        """
        Serve on what was bound.
        """
        self._context = self._material.server_context()
        for listener in self._listeners:
            group.create_task(listener.run(self._context), name="token-listener")

    async def register_clients(self) -> None:
        """
        Make sure that the CLI's and the agents' clients exist, through the admin API like everybody else.
        """
        await register_both(self._settings, self._directory, self._tree, self._material)

    async def refresh(self) -> None:
        """
        Take over a renewed certificate; connections go on.
        """
        if self._material.refresh(self._context):
            log.info("token_certificate_renewed")

    async def answers(self) -> bool:
        """
        Whether the public endpoint answers now.
        """
        port = self._settings.cli.control_plane.hydra_public_port
        return await tls_answers(LOOPBACK, port, self._material.client_context())

    def close(self) -> None:
        """
        Stop serving.
        """
        for listener in self._listeners:
            listener.close()

    async def wait_crash(self) -> ClawkerError:
        """
        Wait for ever: there is nothing of it that could be lost alone.
        """
        await asyncio.Event().wait()
        raise AssertionError

    def supervised(self) -> AbstractAsyncContextManager[object]:
        """
        Nothing: there are no children.
        """
        return nullcontext()


async def register_both(settings: Settings, directory: Path, tree: AuthTree, material: ListenerMaterial) -> None:
    """
    Register `clawker-cli` and `clawker-agent` at the authority's admin API.

    The agents' client has two keys: the CLI's first, then that of the assertions this server makes for sandboxes.
    """
    jwk = await asyncio.to_thread(tree.path(SIGNING_JWK).read_bytes)
    sandbox = await asyncio.to_thread(signing_key, directory / "assertion-signing.key")
    keys = [*read_jwks(jwk), public_jwk(sandbox.public_key(), kid=SANDBOX_KID)]
    admin = f"https://localhost:{settings.cli.control_plane.hydra_admin_port}"
    tls = material.client_context()
    await register_cli_client(admin, jwk, tls)
    await register_agent_client(admin, json.dumps({"keys": keys}), tls)
