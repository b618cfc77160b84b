"""
Calling the control plane: one channel, a bearer token on every call, re-minted once when refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from clawker_cp._proto.clawker.admin.v1 import admin_pb2, admin_pb2_grpc
from clawker_cp._proto.clawker.control.v1 import control_pb2_grpc
from clawker_cp.adminclient.failures import RpcFailed, failure_of
from clawker_cp.adminclient.identity import ClientIdentity
from clawker_cp.adminclient.tokens import TokenSource
from clawker_cp.errors import DeadlineExceeded

SERVER_NAME = "clawker-controlplane"
CALL_LIMIT_S = 15.0
LONG_CALL_LIMIT_S = 210.0
LONG_CALLS = frozenset({"FirewallInit", "FirewallReload"})
CLOCK_LIMIT_S = 30.0
CLOCK_EVERY_S = 0.5
T = TypeVar("T")


class AsyncAdminClient:
    """
    AdminService and ControlService of one control plane. `async with` opens and closes the channel.

    `call` is for unary methods, `stream` for those that stream; both raise `RpcFailed`.
    """

    def __init__(
        self,
        identity: ClientIdentity,
        *,
        host: str = "127.0.0.1",
        admin_port: int = 7443,
        token_port: int = 4444,
        tokens: TokenSource | None = None,
    ) -> None:
        self._identity = identity
        self._target = f"{host}:{admin_port}"
        url = f"https://{host}:{token_port}/oauth2/token"
        self._tokens = tokens or TokenSource(identity, url=url, audience=f"https://127.0.0.1:{token_port}/oauth2/token")
        self._channel: grpc.aio.Channel | None = None
        self._stubs: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"AsyncAdminClient({self._target!r})"

    async def __aenter__(self) -> AsyncAdminClient:
        identity = self._identity
        credentials = grpc.ssl_channel_credentials(
            identity.read("ca/ca.pem"), identity.read("cli/client.key"), identity.read("cli/client.pem")
        )
        options = [
            ("grpc.ssl_target_name_override", SERVER_NAME),
            ("grpc.max_receive_message_length", 16 * 1024 * 1024),
            ("grpc.enable_http_proxy", 0),
        ]
        self._channel = grpc.aio.secure_channel(self._target, credentials, options=options)
        self._stubs = (
            admin_pb2_grpc.AdminServiceStub(self._channel),
            control_pb2_grpc.ControlServiceStub(self._channel),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def call(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """
        One unary call within `timeout_s` (15 s; 210 s for Init and Reload).

        A refused token is fetched anew and the call repeated, once; nothing else is ever repeated.
        """
        limit = timeout_s or (LONG_CALL_LIMIT_S if method in LONG_CALLS else CALL_LIMIT_S)
        stub = self._method(method)
        for attempt in (1, 2):
            token = "" if method == "GetSystemTime" else await self._tokens.token()
            try:
                return await stub(request, timeout=limit, metadata=_bearer(token))
            except grpc.aio.AioRpcError as error:
                if attempt == 2 or error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                    raise failure_of(error) from None
                self._tokens.discard(token)
        raise AssertionError

    async def stream(self, method: str, requests: Any) -> AsyncIterator[Any]:
        """
        Messages of a streaming method; `requests` is one message, or an iterator for two-way streams.
        """
        call: Any = self._method(method)(requests, metadata=_bearer(await self._tokens.token()))
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise failure_of(error) from None
        finally:
            call.cancel()

    async def wait_clock(self, *, limit_s: float = CLOCK_LIMIT_S, wall: Callable[[], float] = time.time) -> None:
        """
        Wait until the server's clock is not behind this one: tokens would be from the future there.

        Raises `DeadlineExceeded` saying by how much.
        """
        until = time.monotonic() + limit_s
        while True:
            answer = await self.call("GetSystemTime", admin_pb2.GetSystemTimeRequest())
            behind = wall() - answer.unix_nanos / 1e9
            if behind <= 1.0:
                return
            if time.monotonic() >= until:
                raise DeadlineExceeded(
                    f"the control plane's clock is {behind:.0f} s behind this one", hint="set both clocks"
                )
            await asyncio.sleep(CLOCK_EVERY_S)

    def _method(self, name: str) -> Any:
        if self._channel is None:
            raise RpcFailed("FAILED_PRECONDITION", "the client is not open: use `async with`")
        for stub in self._stubs:
            found = getattr(stub, name, None)
            if found is not None:
                return found
        raise AttributeError(f"no method {name}")


class AdminClient:
    """
    The same for programs without a loop. `with` opens and closes it; not for use inside a running loop.
    """

    def __init__(self, identity: ClientIdentity, **options: Any) -> None:
        self._make: Callable[[], AsyncAdminClient] = lambda: AsyncAdminClient(identity, **options)
        self._client: AsyncAdminClient | None = None
        self._runner: asyncio.Runner | None = None

    def __enter__(self) -> AdminClient:
        self._runner = asyncio.Runner()
        self._client = self._make()
        self._run(lambda client: client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        if self._runner is not None and self._client is not None:
            self._run(lambda client: client.__aexit__())
            self._runner.close()

    def call(self, method: str, request: Any, *, timeout_s: float | None = None) -> Any:
        """See `AsyncAdminClient.call`."""
        return self._run(lambda client: client.call(method, request, timeout_s=timeout_s))

    def wait_clock(self) -> None:
        """See `AsyncAdminClient.wait_clock`."""
        self._run(lambda client: client.wait_clock())

    @contextmanager
    def stream(self, method: str, request: Any) -> Iterator[Iterator[Any]]:
        """
        Messages of a server-streaming method, one after the other; leaving the block ends the stream.
        """
        assert self._client is not None and self._runner is not None
        messages = self._client.stream(method, request)
        runner = self._runner

        def follow() -> Iterator[Any]:
            while (message := runner.run(_next(messages))) is not None:
                yield message

        try:
            yield follow()
        finally:
            runner.run(_close(messages))

    def _run(self, make: Callable[[AsyncAdminClient], Coroutine[Any, Any, T]]) -> T:
        if self._runner is None or self._client is None:
            raise RpcFailed("FAILED_PRECONDITION", "the client is not open: use `with`")
        return self._runner.run(make(self._client))


async def _next(messages: AsyncIterator[Any]) -> Any:
    return await anext(messages, None)


async def _close(messages: Any) -> None:
    await messages.aclose()


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()
