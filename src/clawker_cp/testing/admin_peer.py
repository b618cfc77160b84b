"""
A server as the admin client sees one, that refuses, waits and answers as a test says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from clawker_cp._proto.clawker.admin.v1 import admin_pb2, admin_pb2_grpc
from clawker_cp._proto.clawker.control.v1 import control_pb2, control_pb2_grpc
from clawker_cp.adminclient import AsyncAdminClient, ClientIdentity
from clawker_cp.adminclient.tokens import TokenSource
from clawker_cp.pki.material import ListenerMaterial
from clawker_cp.pki.tree import AuthTree
from clawker_cp.runtime.asgi import Answer, Application, Request
from clawker_cp.runtime.listeners import HttpListener

Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Servicer(
    control_pb2_grpc.ControlServiceServicer,  # type: ignore[misc]  # generated without types
    admin_pb2_grpc.AdminServiceServicer,  # type: ignore[misc]  # generated without types
):
    """Refuses the first `refuse` calls as unauthenticated, streams after `before` messages, and keeps who called."""

    def __init__(self) -> None:
        self.refuse = 0
        self.before = 0
        self.unix_nanos = 0
        self.bearers: list[str] = []

    async def _judge(self, context: Any) -> None:
        if self.refuse:
            self.refuse -= 1
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "token inactive or invalid")

    def _note(self, context: Any) -> None:
        self.bearers.append(dict(context.invocation_metadata()).get("authorization", ""))

    async def GetSystemTime(self, request: Any, context: Any) -> Any:
        self._note(context)
        await self._judge(context)
        return admin_pb2.GetSystemTimeResult(unix_nanos=self.unix_nanos)

    async def FirewallListRules(self, request: Any, context: Any) -> Any:
        self._note(context)
        await self._judge(context)
        return admin_pb2.FirewallListRulesResult()

    async def WatchEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._note(context)
        for _ in range(self.before):
            yield control_pb2.Event(name="first")
        await self._judge(context)
        yield control_pb2.Event(name="last")

    async def AttachSandbox(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        self._note(context)
        await self._judge(context)
        yield control_pb2.AttachSandboxResult(exit_code=7)


class Peer:
    """One auth tree, a token endpoint that numbers its tokens, and a gRPC server with `Servicer`."""

    def __init__(self, directory: Path) -> None:
        self.tree = AuthTree(directory / "auth")
        self.tree.ensure()
        self.servicer = Servicer()
        self.issued = 0
        self.answer: Answer | None = None
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()
        self.go_on.set()
        self.token_port = self.admin_port = 0

    async def _token(self, request: Request) -> Answer:
        self.asked.set()
        await self.go_on.wait()
        if self.answer is not None:
            return self.answer
        self.issued += 1
        return Answer(200, {"access_token": f"token-{self.issued}", "expires_in": 3600})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Peer]:
        material = ListenerMaterial(self.tree)
        now = material.read()
        credentials = grpc.ssl_server_credentials([(now.key_pem, now.certificate_pem)], now.ca_pem, True)
        server = grpc.aio.server()
        control_pb2_grpc.add_ControlServiceServicer_to_server(self.servicer, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self.servicer, server)
        self.admin_port = server.add_secure_port("127.0.0.1:0", credentials)
        endpoint = HttpListener("token", Application({("/oauth2/token", "POST"): self._token}), [("127.0.0.1", 0)])
        endpoint.open()
        self.token_port = endpoint.ports[0]
        await server.start()
        async with asyncio.TaskGroup() as group:
            group.create_task(endpoint.run(material.server_context()))
            try:
                yield self
            finally:
                self.go_on.set()
                await server.stop(0)
                endpoint.close()

    def identity(self) -> ClientIdentity:
        return ClientIdentity(self.tree.root)

    def client(self, **ports: Any) -> AsyncAdminClient:
        return AsyncAdminClient(
            self.identity(), **{"admin_port": self.admin_port, "token_port": self.token_port} | ports
        )

    def source(self, port: int = 0, identity: ClientIdentity | None = None) -> TokenSource:
        url = f"https://127.0.0.1:{port or self.token_port}/oauth2/token"
        return TokenSource(identity or self.identity(), url=url, audience=url)


@asynccontextmanager
async def listening(connected: Connected, tree: AuthTree | None = None) -> AsyncIterator[int]:
    """A TCP server on loopback, with TLS if it is given a tree; its port."""
    tls = ListenerMaterial(tree).server_context() if tree is not None else None
    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        async with asyncio.timeout(5):
            await server.wait_closed()
