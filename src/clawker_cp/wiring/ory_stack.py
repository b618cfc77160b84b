"""
Hydra as the token authority, with Kratos and Oathkeeper beside it where they are installed.

They are children that live and die with this server; losing one drains it (ruling R23). Hydra's public port
stays behind `auth.front`. Without Hydra the embedded authority of `token_service` serves instead.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import structlog

from clawker_cp.agents.database import Database
from clawker_cp.auth.authority.ledger import Ledger
from clawker_cp.auth.front import HydraFront
from clawker_cp.auth.hydra import BarList, ensure_access_token_key
from clawker_cp.auth.introspect import HydraIntrospector
from clawker_cp.auth.ory import HYDRA_BEHIND_FRONT, LOOPBACK, OryConfigs, write_ory_configs
from clawker_cp.auth.tally import TokenTally
from clawker_cp.config import Settings
from clawker_cp.errors import ClawkerError, DeadlineExceeded, InvalidInput, Unavailable
from clawker_cp.pki.material import ListenerMaterial
from clawker_cp.pki.tree import SERVER, AuthTree
from clawker_cp.processes.health import HealthCheck
from clawker_cp.processes.manager import SubprocessManager
from clawker_cp.runtime.durable import write_durably
from clawker_cp.runtime.listeners import HttpListener
from clawker_cp.runtime.startup import tls_answers
from clawker_cp.wiring.token_service import EmbeddedTokens, TokenBackend, register_both

log = structlog.get_logger()

POLL_S, HEALTHY_LIMIT_S, MIGRATE_LIMIT_S, STOP_LIMIT_S = 0.05, 30.0, 30.0, 5.0
SECRET_BYTES = 32
# No home: they would look for settings there, and Hydra for a Go tool chain on a longer path.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


@dataclass(frozen=True, slots=True)
class OryBinaries:
    """Paths of the three programs, "" for one that is not installed."""

    hydra: str = ""
    kratos: str = ""
    oathkeeper: str = ""

    @classmethod
    def find(cls) -> OryBinaries:
        """Look for them on PATH."""
        return cls(*(shutil.which(name) or "" for name in ("hydra", "kratos", "oathkeeper")))


def token_backend(
    settings: Settings, directory: Path, tree: AuthTree, database: Database, addresses: Sequence[str]
) -> TokenBackend:
    """
    The authority that the settings ask for; `auto` is Hydra where it is installed.

    Raises `InvalidInput` when Hydra is asked for and is not there.
    """
    wanted, binaries = settings.oauth.implementation, OryBinaries.find()
    if wanted == "embedded" or (wanted == "auto" and not binaries.hydra):
        return EmbeddedTokens(settings, directory, tree, database, addresses)
    if not binaries.hydra:
        raise InvalidInput(
            "oauth.implementation: hydra is asked for, and there is no program of that name on PATH",
            hint="install Ory Hydra, or set it to auto or embedded",
        )
    return HydraTokens(settings, directory, tree, database, addresses, binaries)


class HydraTokens:
    """
    The real Hydra. Fulfils `TokenBackend`.
    """

    implementation = "hydra"

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        tree: AuthTree,
        database: Database,
        addresses: Sequence[str],
        binaries: OryBinaries,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._tree = tree
        self._ledger = Ledger(database)
        self._bars = BarList(self._ledger)
        self._addresses = tuple(addresses)
        self._binaries = binaries
        self._material = ListenerMaterial(tree)
        self._manager = SubprocessManager()
        self._admin = f"https://{LOOPBACK}:{settings.cli.control_plane.hydra_admin_port}"
        self._configs: OryConfigs | None = None
        self._front: HydraFront | None = None
        self._listener: HttpListener | None = None
        self._introspector: HydraIntrospector | None = None
        self.children = tuple(name for name in ("kratos", "oathkeeper") if getattr(binaries, name))

    @property
    def introspector(self) -> HydraIntrospector:
        """Asks Hydra's admin port."""
        assert self._introspector is not None
        return self._introspector

    @property
    def bars(self) -> BarList:
        """What was revoked here and Hydra calls active."""
        return self._bars

    @property
    def tally(self) -> TokenTally:
        """The front's."""
        assert self._front is not None
        return self._front.tally

    @property
    def revocation(self) -> BarList:
        """The same list, to write."""
        return self._bars

    def load(self, now: float) -> None:
        """
        Write the three configurations, and Hydra's secret once. Blocks for the disk.
        """
        self._ledger.load(now)
        self._configs = write_ory_configs(
            self._settings,
            system_secret(self._directory / "hydra-system-secret"),
            self._directory / "ory",
            certificate=self._tree.path(SERVER.certificate),
            key=self._tree.path(SERVER.key),
        )
        tls = self._material.client_context()
        self._introspector = HydraIntrospector(f"{self._admin}/admin/oauth2/introspect", tls)
        self._front = HydraFront(
            f"https://{LOOPBACK}:{HYDRA_BEHIND_FRONT}", tls, exchanges_per_s=self._settings.oauth.exchanges_per_s
        )
        port = self._settings.cli.control_plane.hydra_public_port
        addresses = [(host, port) for host in self._addresses]
        self._listener = HttpListener("token endpoint", self._front.application(), addresses)

    def open(self) -> None:
        """
        Bind the front. Raises `Conflict` naming the port that is taken.
        """
        assert self._listener is not None
        self._listener.open()

    def supervised(self) -> AbstractAsyncContextManager[object]:
        """
        The children's manager: they are ended, the last started first, when it is left.
        """
        return self._manager

    async def start(self, group: asyncio.TaskGroup) -> None:
        """
        Start what is installed and wait until all of it is healthy; then serve the front.

        Raises `Unavailable` or `DeadlineExceeded` with the last output of the one that is not.
        """
        assert self._configs is not None
        await migrate(self._binaries.hydra, self._configs.dsn)
        await self._launch("hydra", ["serve", "all", "--sqa-opt-out"])
        if self._binaries.kratos:
            await self._launch("kratos", ["serve", "--sqa-opt-out"])
        if self._binaries.oathkeeper:
            await self._launch("oathkeeper", ["serve"])
        for name, url in self._health_urls():
            await self._manager.wait_healthy(
                name, HealthCheck(url, POLL_S, HEALTHY_LIMIT_S, self._material.client_context())
            )
        if self._binaries.oathkeeper:
            await self._wait_oathkeeper_proxy()
        await ensure_access_token_key(self._admin, self._material.client_context())
        self._context = self._material.server_context()
        assert self._listener is not None
        group.create_task(self._listener.run(self._context), name="token-front")
        log.info("token_authority_started", implementation="hydra", beside=list(self.children))

    async def register_clients(self) -> None:
        """
        Make sure that the CLI's and the agents' clients exist with today's keys.
        """
        await register_both(self._settings, self._directory, self._tree, self._material)
        assert self._front is not None
        self._front.ready = True

    async def refresh(self) -> None:
        """
        Take over a renewed certificate. Hydra and Kratos reload it by themselves, Oathkeeper is started again.
        """
        if not self._material.refresh(self._context):
            return
        log.info("token_certificate_renewed")
        if self._binaries.oathkeeper:
            await self._manager.stop("oathkeeper", STOP_LIMIT_S)
            await self._launch("oathkeeper", ["serve"])

    async def answers(self) -> bool:
        """
        Whether the front answers, and Hydra behind it.
        """
        tls = self._material.client_context()
        port = self._settings.cli.control_plane.hydra_public_port
        behind = await tls_answers(LOOPBACK, HYDRA_BEHIND_FRONT, tls)
        return behind and await tls_answers(LOOPBACK, port, tls)

    async def wait_crash(self) -> ClawkerError:
        """
        Wait for the unexpected end of a child.
        """
        return await self._manager.crash_channel.get()

    def close(self) -> None:
        """
        Stop serving; from here on the end of a child is expected.
        """
        self._manager.begin_shutdown()
        if self._listener is not None:
            self._listener.close()

    async def _launch(self, name: str, arguments: Sequence[str]) -> None:
        config: Path = getattr(self._configs, name)
        command = [getattr(self._binaries, name), *arguments, "--config", str(config)]
        await self._manager.start(name, command, env=ENVIRONMENT, cwd="/")

    def _health_urls(self) -> list[tuple[str, str]]:
        ory = self._settings.ory
        urls = [
            ("hydra", f"https://{LOOPBACK}:{HYDRA_BEHIND_FRONT}/health/alive"),
            ("hydra", f"{self._admin}/health/alive"),
        ]
        if self._binaries.kratos:
            urls.append(("kratos", f"https://{LOOPBACK}:{ory.kratos_public_port}/health/alive"))
            urls.append(("kratos", f"https://{LOOPBACK}:{ory.kratos_admin_port}/admin/health/alive"))
        if self._binaries.oathkeeper:
            urls.append(("oathkeeper", f"https://{LOOPBACK}:{ory.oathkeeper_api_port}/health/alive"))
        return urls

    async def _wait_oathkeeper_proxy(self) -> None:
        """The proxy's port has no health path: it is up when it takes a TLS connection."""
        port, tls = self._settings.ory.oathkeeper_proxy_port, self._material.client_context()
        await _wait_until(lambda: tls_answers(LOOPBACK, port, tls), f"oathkeeper's proxy port {port}")


async def migrate(hydra: str, dsn: str) -> None:
    """
    Bring Hydra's database to its version. Raises `Unavailable` with what it said.
    """
    process = await asyncio.create_subprocess_exec(
        hydra, "migrate", "sql", "--yes", dsn,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env=ENVIRONMENT, cwd="/",
    )  # fmt: skip
    try:
        async with asyncio.timeout(MIGRATE_LIMIT_S):
            said, _ = await process.communicate()
    except TimeoutError:
        raise DeadlineExceeded(f"hydra's database was not migrated within {MIGRATE_LIMIT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = said.decode("utf-8", "replace").strip().splitlines()
        raise Unavailable(f"hydra's database was not migrated: {' '.join(lines[-3:])}")


def system_secret(path: Path) -> str:
    """
    Hydra's system secret, 32 random bytes as hex, made once: what it encrypts outlives this server.

    Raises `Unavailable` for a file that holds something else.
    """
    try:
        secret = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        secret = secrets.token_hex(SECRET_BYTES)
        write_durably(path, f"{secret}\n".encode(), mode=0o600)
        return secret
    except (OSError, ValueError) as error:
        raise Unavailable(f"{path} cannot be read: {type(error).__name__}") from error
    if len(secret) < SECRET_BYTES * 2:
        raise Unavailable(
            f"{path} holds no secret of {SECRET_BYTES} bytes in hex",
            hint="restore it; without it Hydra's database is lost, and with a new one clients only need new tokens",
        )
    return secret


async def _wait_until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    try:
        async with asyncio.timeout(HEALTHY_LIMIT_S):
            while not await condition():  # noqa: ASYNC110  # another process cannot set our event
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise DeadlineExceeded(f"{what} does not answer within {HEALTHY_LIMIT_S:g} s") from None
