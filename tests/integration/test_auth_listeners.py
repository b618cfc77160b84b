"""The two listeners as the application builds them, with the real services and their scopes (threats 30 and 31)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from clawker_cp import AuthInterceptor, admin_method_scopes, agent_method_scopes, control_method_scopes
from clawker_cp._proto.clawker.admin.v1 import admin_pb2
from clawker_cp._proto.clawker.agent.v1 import agent_pb2
from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.auth.scopes import AGENT_CLIENT, CLI_CLIENT
from clawker_cp.errors import Conflict
from clawker_cp.rpc.limits import AGENT_LIMITS
from clawker_cp.rpc.server import RpcServer
from clawker_cp.rpc.services import admin_service, agent_service, control_service
from clawker_cp.rpc.transport import grpc
from clawker_cp.testing.rpc_world import Authority, RpcWorld, active, bearer

ADMIN, CONTROL, AGENT = (
    "clawker.admin.v1.AdminService",
    "clawker.control.v1.ControlService",
    "clawker.agent.v1.AgentService",
)
SCOPE = 'token missing required scope "%s"'


class Servicer:
    """Answers every method of every service with nothing; one refuses with a reason."""

    async def FirewallEnable(self, request: Any, context: Any) -> Any:
        raise Conflict("container 12 is gone", code="CONTAINER_GONE")

    def __getattr__(self, name: str) -> Any:
        async def answer(_request: Any, context: Any) -> Any:
            for module in (admin_pb2, control_pb2, agent_pb2):
                for kind in ("Result", ""):
                    found = getattr(module, "Welcome" if name == "Register" else name + kind, None)
                    if found is not None:
                        return found()
            raise KeyError(name)

        return answer


@dataclass
class Listeners:
    world: RpcWorld
    operators: RpcServer
    agents: RpcServer
    ready: bool = True


@pytest.fixture
async def listeners(tmp_path: Any) -> AsyncIterator[Listeners]:
    world = RpcWorld(tmp_path)
    authority = Authority(cli=active(), agent=active("agent:self:register", AGENT_CLIENT))
    operators = AuthInterceptor(authority, {**admin_method_scopes(), **control_method_scopes()})
    operators.require_client_id(CLI_CLIENT).require_common_name("clawker-cli")
    agents = AuthInterceptor(authority, agent_method_scopes()).require_client_id(AGENT_CLIENT)
    servicer = Servicer()
    address = ["127.0.0.1:0"]
    both = Listeners(
        world,
        RpcServer(
            "operators", address, world.material, operators, [admin_service(servicer), control_service(servicer)],
            is_ready=lambda: both.ready,
        ),
        RpcServer("agents", address, world.material, agents, [agent_service(servicer)], limits=AGENT_LIMITS),
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        for server in (both.operators, both.agents):
            stack.push_async_callback(server.stop, 0)
            await server.start()
        yield both


async def said(listeners: Listeners, server: RpcServer, pair: Any, method: str, token: str = "") -> tuple[str, str]:
    """Status and message of an empty call on a connection of its own."""
    async with listeners.world.channel(server.ports[0], pair) as channel:
        try:
            await channel.unary_unary(f"/{method}")(b"", metadata=bearer(token) if token else (), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details() or ""
    return "OK", ""


async def test_each_listener_takes_its_own_and_nobody_else(listeners: Listeners) -> None:
    """Certificate, token, client and scope have to be those of the listener, in the order of the contract."""
    world, operators, agents = listeners.world, listeners.operators, listeners.agents
    denied, unknown = "PERMISSION_DENIED", "UNAUTHENTICATED"
    wrong = (denied, "client certificate not accepted here")
    table = [
        (operators, world.cli, f"{ADMIN}/ListAgents", "cli", ("OK", "")),
        (operators, world.cli, f"{CONTROL}/GetStatus", "cli", ("OK", "")),
        (operators, world.cli, f"{ADMIN}/GetSystemTime", "", ("OK", "")),
        (operators, world.cli, f"{CONTROL}/GetStatus", "", (unknown, "missing bearer token")),
        (operators, world.cli, f"{ADMIN}/ListAgents", "agent", (denied, SCOPE % "admin")),
        (operators, world.agent, f"{ADMIN}/ListAgents", "agent", wrong),
        (operators, world.agent, f"{ADMIN}/ListAgents", "cli", wrong),
        (operators, world.agent, f"{CONTROL}/RevokeToken", "cli", wrong),
        (operators, world.agent, f"{ADMIN}/GetSystemTime", "", wrong),
        (operators, world.cli, f"{AGENT}/Register", "cli", (unknown, "unauthorized")),
        (agents, world.agent, f"{AGENT}/Register", "agent", ("OK", "")),
        (agents, world.agent, f"{AGENT}/Register", "", (unknown, "missing bearer token")),
        (agents, world.agent, f"{AGENT}/Register", "cli", (denied, SCOPE % "agent:self:register")),
        (agents, world.agent, f"{ADMIN}/FirewallRemove", "agent", (unknown, "unauthorized")),
        (agents, world.cli, f"{ADMIN}/FirewallRemove", "cli", (unknown, "unauthorized")),
        (agents, world.agent, f"{ADMIN}/GetSystemTime", "", (unknown, "unauthorized")),
    ]
    for server, pair, method, token, expected in table:
        assert await said(listeners, server, pair, method, token) == expected, (method, token)


async def test_before_ready_operators_see_the_boot_methods_and_agents_are_served(listeners: Listeners) -> None:
    """The gate stands on the operators' listener only, and before authentication."""
    listeners.ready = False
    world, operators = listeners.world, listeners.operators
    starting = ("FAILED_PRECONDITION", "control plane is starting up")
    assert await said(listeners, operators, world.cli, f"{ADMIN}/ListAgents", "cli") == starting
    assert await said(listeners, operators, world.agent, f"{ADMIN}/ListAgents") == starting
    assert await said(listeners, operators, world.cli, f"{ADMIN}/GetSystemTime") == ("OK", "")
    assert await said(listeners, operators, world.cli, f"{CONTROL}/GetStatus", "cli") == ("OK", "")
    assert await said(listeners, listeners.agents, world.agent, f"{AGENT}/Register", "agent") == ("OK", "")


async def test_a_refusal_of_a_servicer_carries_its_reason(listeners: Listeners) -> None:
    """As the released CLI reads it."""
    world, (port,) = listeners.world, listeners.operators.ports
    async with world.channel(port) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary(f"/{ADMIN}/FirewallEnable")(b"", metadata=bearer("cli"))
    metadata = dict(raised.value.trailing_metadata() or ())
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert b"CONTAINER_GONE" in metadata["grpc-status-details-bin"]
    assert b"firewall.clawker.dev" in metadata["grpc-status-details-bin"]
