"""AgentService over real mTLS: the address decides, the certificate is compared, the request is believed in nothing."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from clawker_cp._proto.clawker.agent.v1 import agent_pb2
from clawker_cp.agents.database import Database
from clawker_cp.agents.identity import Rejected
from clawker_cp.agents.registration import Registration
from clawker_cp.agents.registry import Registry
from clawker_cp.auth.introspect import IntrospectionResult
from clawker_cp.auth.scopes import AGENT_CLIENT, agent_method_scopes, health_method_scopes
from clawker_cp.errors import InvalidInput
from clawker_cp.rpc.agent import AgentServicer
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.interceptors.identity import IdentityInterceptor, caller_of, current_caller, peer_address
from clawker_cp.rpc.server import RpcServer
from clawker_cp.rpc.services import HealthService, agent_service
from clawker_cp.rpc.tls import TlsMaterial
from clawker_cp.testing.certificates import TestCa

ID = "c" * 64
NAMED, CONTAINED = "urn:clawker:agent:clawker.shop.dev", f"urn:clawker:container:{ID}"


@dataclass(frozen=True)
class Record:
    id: str = ID
    project: str = "shop"
    agent: str = "dev"


class Engine:
    """Says who is at loopback."""

    def __init__(self) -> None:
        self.found: Sequence[Record] = [Record()]

    async def running_at(self, address: str) -> Sequence[Record]:
        assert address == "127.0.0.1"
        if not self.found:
            raise RuntimeError("a bug")
        return self.found


class Authority:
    """Knows the tokens of each client by how they begin."""

    async def introspect(self, token: str, required_scope: str) -> IntrospectionResult:
        client = {"agent": AGENT_CLIENT, "cli": "clawker-cli"}.get(token.partition("-")[0], "")
        return IntrospectionResult(bool(client), "agent:self:register", client, client, 4_000_000_000)


class World:
    """A listener for agents on loopback."""

    def __init__(self, directory: Path) -> None:
        self.ca = TestCa(directory)
        self.server = self.ca.server()
        self.database = Database(directory / "cp.db")
        self.registry = Registry(self.database)
        self.engine = Engine()
        self.numbers = itertools.count()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        self.database.open()

        async def registered(_: str) -> None:
            return None

        auth = AuthInterceptor(Authority(), {**agent_method_scopes(), **health_method_scopes()})
        health = HealthService(["clawker.agent.v1.AgentService"])
        server = RpcServer(
            "agents", ["127.0.0.1:0"],
            lambda: TlsMaterial(self.server.certificate_pem, self.server.key_pem, self.ca.certificate.read_bytes()),
            auth.require_client_id(AGENT_CLIENT),
            [agent_service(AgentServicer(Registration(self.registry, registered=registered))), health],
            identity=[IdentityInterceptor(self.engine)],
        )  # fmt: skip
        (port,) = await server.start()
        await health.serve()
        try:
            yield port
        finally:
            await server.stop(0)
            self.database.close()

    async def ask(
        self, port: int, method: str, request: Any, *, uris: Sequence[str] = (NAMED, CONTAINED),
        name: str = "clawker-clawkerd", token: str = "agent",
    ) -> tuple[str, str]:  # fmt: skip
        """Code and details of one call with a new leaf, "OK" if it was answered."""
        pair = self.ca.leaf(name, uris=uris, file="leaf")
        credentials = grpc.ssl_channel_credentials(self.ca.certificate.read_bytes(), pair.key_pem, pair.certificate_pem)
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            call = channel.unary_unary(method, request_serializer=lambda message: message)
            try:
                # A token of its own: one belongs to the leaf that first presents it.
                bearer = f"Bearer {token}-{next(self.numbers)}"
                await call(request, metadata=(("authorization", bearer),), timeout=5)
            except grpc.aio.AioRpcError as error:
                return error.code().name, error.details() or ""
        return "OK", ""

    async def register(self, port: int, project: str = "shop", agent: str = "dev", **more: Any) -> tuple[str, str]:
        request = agent_pb2.RegisterRequest(agent_name=agent, project=project).SerializeToString()
        return await self.ask(port, "/clawker.agent.v1.AgentService/Register", request, **more)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


REJECTED = ("PERMISSION_DENIED", "registration rejected")


async def test_an_agent_registers_once(world: World) -> None:
    """The first leaf of the container is stored; a second leaf of the same names is refused."""
    async with world.serving() as port:
        assert await world.register(port) == ("OK", "")
        (row,) = world.registry.snapshot()
        assert (row.container_id, row.project, row.agent) == (ID, "shop", "dev")
        assert await world.register(port) == REJECTED
        assert world.registry.snapshot() == [row]
    assert current_caller() is None


async def test_refusals_read_alike(world: World) -> None:
    """Whatever does not fit is the same answer, and a surprise of the engine's is one too."""
    async with world.serving() as port:
        assert await world.register(port, name="clawker-cli") == REJECTED
        assert await world.register(port, uris=[CONTAINED]) == REJECTED
        assert await world.register(port, uris=[NAMED]) == REJECTED
        assert await world.register(port, uris=["urn:clawker:agent:clawker.shop.other", CONTAINED]) == REJECTED
        assert await world.register(port, agent="other") == REJECTED
        world.engine.found = [Record(), Record("d" * 64)]
        assert await world.register(port) == REJECTED
        world.engine.found = []
        assert await world.register(port) == REJECTED
        assert world.registry.snapshot() == []


async def test_the_token_comes_before_the_identity(world: World) -> None:
    """Nobody without an agent's token learns whether the address is known; a bad name is told as such."""
    async with world.serving() as port:
        assert (await world.register(port, token="nobody"))[0] == "UNAUTHENTICATED"
        code, said = await world.register(port, token="cli", name="clawker-cli")
        assert (code, said) == ("PERMISSION_DENIED", 'token missing required scope "agent:self:register"')
        assert await world.register(port, agent="a b") == ("INVALID_ARGUMENT", "register: invalid agent name")
        assert await world.ask(port, "/clawker.agent.v1.AgentService/Register", b"\xff") == (
            "INVALID_ARGUMENT", "malformed request",
        )  # fmt: skip


async def test_health_needs_the_certificate_of_an_agent_and_no_token(world: World) -> None:
    """grpc.health.v1 is behind the same identity."""
    async with world.serving() as port:
        assert await world.ask(port, "/grpc.health.v1.Health/Check", b"", token="none") == ("OK", "")
        assert await world.ask(port, "/grpc.health.v1.Health/Check", b"", uris=[]) == REJECTED
        assert (await world.ask(port, "/grpc.health.v1.Health/Check", b"\n\x01x", token="x"))[0] == "NOT_FOUND"


def test_addresses_of_peers_are_read() -> None:
    """Both families, encoded or not; anything that is no TCP address is none."""
    assert peer_address("ipv4:10.0.0.2:4711") == "10.0.0.2"
    assert peer_address("ipv6:%5B::ffff:10.0.0.2%5D:4711") == "::ffff:10.0.0.2"
    assert peer_address("ipv6:[fe80::1%25eth0]:4711") == "fe80::1"
    for text in ("unix:/run/x", "", "unknown"):
        assert peer_address(text) == ""


async def test_a_call_without_a_message_is_said(tmp_path: Path) -> None:
    """What the transport could not give us is the caller's fault, and nobody is registered."""

    async def registered(_id: str) -> None:
        raise AssertionError

    registration = Registration(Registry(Database(tmp_path / "cp.db")), registered=registered)
    with pytest.raises(InvalidInput, match="register: nil request"):
        await AgentServicer(registration).Register(None, None)


def test_a_caller_without_certificate_or_address_is_nobody() -> None:
    """Neither is made up from the other."""

    class Call:
        def auth_context(self) -> dict[str, Any]:
            return {}

        def peer(self) -> str:
            return "unix:/somewhere"

    with pytest.raises(Rejected) as rejected:
        caller_of(Call())
    assert rejected.value.event == "agent_identity_peer_auth_missing"
