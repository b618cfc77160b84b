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
from google.protobuf.message import Message

from clawker_cp._proto.clawker.admin.v1 import admin_pb2, admin_pb2_grpc
from clawker_cp._proto.clawker.control.v1 import control_pb2_grpc
from clawker_cp.adminclient.failures import RpcFailed, failure_of
from clawker_cp.adminclient.identity import SERVER_NAME, ClientIdentity
from clawker_cp.adminclient.tokens import TokenSource
from clawker_cp.errors import DeadlineExceeded, Unauthenticated

CALL_LIMIT_S = 15.0
LONG_CALL_LIMIT_S = 210.0
LONG_CALLS = frozenset({"FirewallInit", "FirewallReload"})
CLOCK_LIMIT_S = 30.0
CLOCK_EVERY_S = 0.5
SETTLE_LIMIT_S = 1.0
# Two machines never agree exactly, and the authority forgives a minute.
CLOCK_TOLERANCE_S = 1.0
# From where on an assertion of half a minute may be refused for it.
CLOCK_REFUSED_S = 30.0
CLOCK_ASK_S = 2.0
WITHOUT_TOKEN = frozenset({"GetSystemTime"})
T = TypeVar("T")
_CLOSED = "the client is not open: use `with`"


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
        material = self._identity.channel_material()
        credentials = grpc.ssl_channel_credentials(material.ca, material.key, material.leaf)
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
        One unary call within `timeout_s` (15 s; 210 s for Init and Reload); a token is waited for before that.

        A refused token is fetched anew and the call repeated, once; nothing else is ever repeated.
        """
        if timeout_s is None:
            timeout_s = LONG_CALL_LIMIT_S if method in LONG_CALLS else CALL_LIMIT_S
        stub = self._method(method)
        repeatable = method not in WITHOUT_TOKEN
        while True:
            token = await self._token() if method not in WITHOUT_TOKEN else ""
            try:
                return await stub(request, timeout=timeout_s, metadata=_bearer(token))
            except grpc.aio.AioRpcError as error:
                if not self._is_refused(error, token) or not repeatable:
                    raise failure_of(error) from None
                repeatable = False

    async def stream(self, method: str, requests: Any) -> AsyncIterator[Any]:
        """
        Messages of a streaming method; `requests` is one message, or an iterator for two-way streams.

        A refused token is fetched anew once, if nothing came yet; not for an iterator, which may be used up.
        """
        stub = self._method(method)
        repeatable = isinstance(requests, Message)
        while True:
            token = await self._token()
            call: Any = stub(requests, metadata=_bearer(token))
            try:
                async for message in call:
                    repeatable = False
                    yield message
                return
            except grpc.aio.AioRpcError as error:
                if not self._is_refused(error, token) or not repeatable:
                    raise failure_of(error) from None
                repeatable = False
            finally:
                call.cancel()

    async def wait_clock(self, *, limit_s: float = CLOCK_LIMIT_S, wall: Callable[[], float] = time.time) -> None:
        """
        Wait until the server's clock is not behind this one: tokens would be from the future there.

        Raises `DeadlineExceeded` saying by how much.
        """
        until = time.monotonic() + limit_s
        while True:
            # Read before asking: what the call takes does not count as being behind.
            asked_at = wall()
            answer = await self.call("GetSystemTime", admin_pb2.GetSystemTimeRequest())
            behind = asked_at - answer.unix_nanos / 1e9
            if behind <= CLOCK_TOLERANCE_S:
                return
            if time.monotonic() >= until:
                raise DeadlineExceeded(
                    f"the control plane's clock is {behind:.0f} s behind this one", hint="set both clocks"
                )
            await asyncio.sleep(CLOCK_EVERY_S)

    async def _token(self) -> str:
        """A token; a refusal says by how much the clocks differ, if it is that."""
        try:
            return await self._tokens.token()
        except Unauthenticated as error:
            refusal = error
        apart = await self._clocks_apart()
        if abs(apart) < CLOCK_REFUSED_S:
            raise refusal
        where = "ahead of" if apart > 0 else "behind"
        hint = f"this clock is {abs(apart):.0f} s {where} the control plane's: set both"
        raise Unauthenticated(refusal.message, code=refusal.code, hint=hint)

    async def _clocks_apart(self) -> float:
        """By how many seconds this clock is ahead of the server's; 0 if it does not say."""
        try:
            answer = await self.call("GetSystemTime", admin_pb2.GetSystemTimeRequest(), timeout_s=CLOCK_ASK_S)
        except RpcFailed:
            return 0.0
        return time.time() - float(answer.unix_nanos) / 1e9

    def _is_refused(self, error: grpc.aio.AioRpcError, token: str) -> bool:
        """
        Whether a call failed for its token, which is then forgotten.
        """
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            return False
        self._tokens.discard(token)
        return True

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
        try:
            self._run(lambda client: client.__aenter__())
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._client is not None:
                self._run(lambda client: client.__aexit__())
        finally:
            self._close()

    def _close(self) -> None:
        runner, self._runner, self._client = self._runner, None, None
        if runner is not None:
            with runner:
                runner.run(_settle())

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
        if self._client is None or self._runner is None:
            raise RpcFailed("FAILED_PRECONDITION", _CLOSED)
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
            raise RpcFailed("FAILED_PRECONDITION", _CLOSED)
        return self._runner.run(make(self._client))


async def _next(messages: AsyncIterator[Any]) -> Any:
    return await anext(messages, None)


async def _close(messages: Any) -> None:
    await messages.aclose()


async def _settle() -> None:
    """
    Let what was cancelled end, within a limit.

    gRPC has one poller for all loops of a process: what ends after its loop was closed is an error in another one.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=SETTLE_LIMIT_S)


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()
