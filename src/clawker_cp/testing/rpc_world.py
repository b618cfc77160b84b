"""
Real gRPC listeners over mTLS on loopback: a CA, an authority that answers from a table, a method of every kind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.wrappers_pb2 import StringValue

from clawker_cp.auth.introspect import IntrospectionResult
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.server import RpcServer
from clawker_cp.rpc.tls import TlsMaterial
from clawker_cp.rpc.transport import grpc
from clawker_cp.testing.certificates import Pair, TestCa

SERVICE = "clawker.test.Kinds"
ONE, MANY, SUM, CHAT = (f"/{SERVICE}/{name}" for name in ("One", "Many", "Sum", "Chat"))
SCOPES = dict.fromkeys((ONE, MANY, SUM, CHAT), "admin")
REACHED = ("x-reached", "yes")
Metadata = Sequence[tuple[str, str | bytes]]


def active(scope: str = "admin", client_id: str = "clawker-cli", life_s: int = 3600) -> IntrospectionResult:
    """What an authority says of a good token."""
    return IntrospectionResult(True, scope, client_id, client_id, int(time.time()) + life_s)


class Authority:
    """
    An introspector that answers from a table and counts; an exception in the table is raised. `go` holds it back.
    """

    def __init__(self, **answers: IntrospectionResult | Exception) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.go = asyncio.Event()
        self.go.set()

    async def introspect(self, token: str, required_scope: str) -> IntrospectionResult:
        """Answer once `go` is set; a token that is not in the table is inactive."""
        self.asked.append(token)
        await self.go.wait()
        answer = self.answers.get(token, IntrospectionResult(active=False))
        if isinstance(answer, Exception):
            raise answer
        return answer


class Log:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def warning(self, event: str, **fields: Any) -> None:
        """Remember a line."""
        self.lines.append(("warning", event, fields))

    def error(self, event: str, **fields: Any) -> None:
        """Remember a line."""
        self.lines.append(("error", event, fields))

    def events(self) -> list[str]:
        """The events, in order."""
        return [event for _level, event, _fields in self.lines]


@dataclass
class Kinds:
    """
    One method of each kind; `reached` says which handlers ran, `on_call` may do what a handler would.
    """

    on_call: Callable[[str, Any], Any] | None = None
    reached: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    async def one(self, request: StringValue, context: Any) -> StringValue:
        """Unary: the request."""
        await self._called("One", context)
        return request

    async def many(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        """Server stream: the request, three times."""
        try:
            await self._called("Many", context)
            for _ in range(3):
                yield request
        finally:
            self.closed.append("Many")

    async def sum(self, requests: AsyncIterator[StringValue], context: Any) -> StringValue:
        """Client stream: the requests, joined."""
        await self._called("Sum", context)
        return StringValue(value="".join([request.value async for request in requests]))

    async def chat(self, requests: AsyncIterator[StringValue], context: Any) -> None:
        """Both ways, in the reader-writer style: each request back."""
        await self._called("Chat", context)
        async for request in requests:
            await context.write(request)

    async def _called(self, name: str, context: Any) -> None:
        self.reached.append(name)
        if self.on_call is not None:
            await self.on_call(name, context)
        await context.send_initial_metadata((REACHED,))

    def register(self, server: Any) -> None:
        """Register with a server, as generated code does."""
        codec = {"request_deserializer": StringValue.FromString, "response_serializer": StringValue.SerializeToString}
        handlers = {
            "One": grpc.unary_unary_rpc_method_handler(self.one, **codec),
            "Many": grpc.unary_stream_rpc_method_handler(self.many, **codec),
            "Sum": grpc.stream_unary_rpc_method_handler(self.sum, **codec),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat, **codec),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_registered_method_handlers(SERVICE, handlers)


class RpcWorld:
    """
    A CA in `directory`, its server leaf, and clients.
    """

    def __init__(self, directory: Path) -> None:
        self.ca = TestCa(directory)
        self.server = self.ca.server()
        self.cli = self.ca.leaf("clawker-cli", server=False)
        self.other = self.ca.leaf("clawker-cli", server=False, file="other")
        self.agent = self.ca.leaf("clawker-clawkerd", uris=["urn:clawker:agent:clawker.p.a"])

    def material(self) -> TlsMaterial:
        """What the server proves itself with, read anew."""
        return TlsMaterial(self.server.certificate_pem, self.server.key_pem, self.ca.certificate.read_bytes())

    @asynccontextmanager
    async def serving(
        self, auth: AuthInterceptor, kinds: Kinds | None = None, **options: Any
    ) -> AsyncIterator[tuple[RpcServer, Any]]:
        """A started server and a channel of the CLI's certificate to it."""
        services = options.pop("services", None) or [(kinds or Kinds()).register]
        server = RpcServer("test", ["127.0.0.1:0"], self.material, auth, services, **options)
        (port,) = await server.start()
        try:
            async with self.channel(port) as channel:
                yield server, channel
        finally:
            await server.stop(0)

    def channel(self, port: int, pair: Pair | None = None, options: Sequence[tuple[str, Any]] = ()) -> Any:
        """A channel of its own connection, with a certificate."""
        pair = pair or self.cli
        credentials = grpc.ssl_channel_credentials(
            self.ca.certificate.read_bytes(), pair.key_pem, pair.certificate_pem
        )  # fmt: skip
        return grpc.aio.secure_channel(
            f"localhost:{port}", credentials, options=[("grpc.use_local_subchannel_pool", 1), *options]
        )


def bearer(token: str) -> Metadata:
    """The metadata of a call with a token."""
    return (("authorization", f"Bearer {token}"),)


async def call(
    channel: Any, method: str, metadata: Metadata = (), *, text: str = "x", timeout: float = 10.0
) -> list[str]:
    """
    Call a method of `Kinds`, whatever its kind; the values of its responses. Raises `grpc.aio.AioRpcError`.

    A stream sends nothing before its handler was reached: grpc's Python client reports INTERNAL instead of the
    server's status when it writes to a call that has ended.
    """
    message = StringValue(value=text)
    kind = {ONE: "unary_unary", MANY: "unary_stream", SUM: "stream_unary", CHAT: "stream_stream"}.get(
        method, "unary_unary"
    )
    begin = getattr(channel, kind)(
        method, request_serializer=StringValue.SerializeToString, response_deserializer=StringValue.FromString
    )
    if not kind.startswith("stream"):
        answer = begin(message, metadata=metadata, timeout=timeout)
    else:

        async def requests() -> AsyncIterator[StringValue]:
            if REACHED in [tuple(one) for one in await answer.initial_metadata()]:
                yield message
                yield message
            else:
                await answer.code()

        answer = begin(requests(), metadata=metadata, timeout=timeout)
    if kind.endswith("unary"):
        return [(await answer).value]
    return [one.value async for one in answer]


async def outcome(
    channel: Any, method: str, metadata: Metadata = (), *, text: str = "x", timeout: float = 10.0
) -> tuple[str, str]:
    """
    The status name and message of a call.
    """
    try:
        await call(channel, method, metadata, text=text, timeout=timeout)
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


__all__ = [
    "CHAT", "MANY", "ONE", "SCOPES", "SUM", "Authority", "Kinds", "Log", "Mapping", "RpcWorld", "active", "bearer",
    "call", "outcome",
]  # fmt: skip
