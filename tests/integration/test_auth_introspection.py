"""The whole way: gRPC over mTLS, introspection over HTTPS, and an authority in every bad state."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import orjson
import pytest

from clawker_cp.auth import introspect
from clawker_cp.auth.introspect import HydraIntrospector
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.testing.rpc_world import ONE, SCOPES, Kinds, Log, RpcWorld, bearer, outcome

FAILED = ("UNAUTHENTICATED", "token validation failed")
INACTIVE = ("UNAUTHENTICATED", "token inactive or invalid")
GOOD = bearer("good")
Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RpcWorld:
    return RpcWorld(tmp_path_factory.mktemp("introspection"))


class Endpoint:
    """An HTTPS introspection endpoint whose mood can change."""

    def __init__(self, world: RpcWorld) -> None:
        self._world = world
        self.asked: list[str] = []
        self.answer: Answer = self.honest
        self.life_s = 3600.0
        self.url = ""

    async def honest(self, token: str, writer: asyncio.StreamWriter) -> None:
        exp = int(time.time() + self.life_s)
        body = {"active": True, "client_id": "clawker-cli", "scope": "admin", "exp": exp} if token == "good" else {}
        self.write(writer, orjson.dumps({"active": False, **body}))

    def write(self, writer: asyncio.StreamWriter, body: bytes, status: str = "200 OK") -> None:
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body))

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Endpoint]:
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                    token = (await reader.readexactly(length)).decode().removeprefix("token=")
                    self.asked.append(token)
                    await self.answer(token, writer)
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=self._world.ca.server_context())
        self.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/admin/oauth2/introspect"
        try:
            yield self
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)


@asynccontextmanager
async def calling(world: RpcWorld, endpoint: Endpoint, **options: object) -> AsyncIterator[tuple[object, Kinds, Log]]:
    kinds, log = Kinds(), Log()
    introspector = HydraIntrospector(endpoint.url, world.ca.client_context())
    auth = AuthInterceptor(introspector, SCOPES, log=log, **options)  # type: ignore[arg-type]
    try:
        async with world.serving(auth, kinds) as (_server, channel):
            yield channel, kinds, log
    finally:
        await introspector.aclose()


async def test_a_real_token_passes_and_is_asked_about_once(world: RpcWorld) -> None:
    """A hundred calls at once, one question."""
    async with Endpoint(world).open() as endpoint, calling(world, endpoint) as (channel, kinds, _log):
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(outcome(channel, ONE, GOOD)) for _ in range(100)]
        assert {call.result() for call in calls} == {("OK", "")}
        assert await outcome(channel, ONE, bearer("bad")) == INACTIVE
    assert endpoint.asked == ["good", "bad"] and len(kinds.reached) == 100


async def test_every_bad_state_of_the_authority_denies_and_none_is_remembered(
    world: RpcWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Malformed, failing, huge, cut off and silent: denied each time, and served once it is well again."""
    monkeypatch.setattr(introspect, "LIMIT_S", 0.3)

    def body(data: bytes, status: str = "200 OK") -> Answer:
        async def answer(_token: str, writer: asyncio.StreamWriter) -> None:
            endpoint.write(writer, data, status)

        return answer

    async def cut(_token: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
        writer.close()

    async def silent(_token: str, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    moods = [
        body(b"not json"),
        body(b'{"active":true}'),
        body(b'{"active":true,"client_id":"clawker-cli","scope":"admin","exp":1e99}'),
        body(b'{"active":true,"client_id":"clawker-cli","scope":"admin","exp":99999999999999999999}'),
        body(b'{"active":true,"client_id":"clawker-cli","scope":"admin","exp":18446744073709551615}'),
        body(b"{}", "500 Internal Server Error"),
        body(b"", "302 Found"),
        body(b'{"active":true,"client_id":"clawker-cli","scope":"admin","exp":4000000000}' + b" " * 300_000),
        cut,
        silent,
    ]
    async with Endpoint(world).open() as endpoint, calling(world, endpoint) as (channel, kinds, log):
        for mood in moods:
            endpoint.answer = mood
            assert await outcome(channel, ONE, GOOD) == FAILED
        endpoint.answer = endpoint.honest
        assert kinds.reached == []
        assert await outcome(channel, ONE, GOOD) == ("OK", "")
    assert len(endpoint.asked) == len(moods) + 1
    assert all("good" not in repr(fields) for _, _, fields in log.lines)


async def test_an_authority_that_is_down_denies_new_tokens_and_not_those_just_seen(world: RpcWorld) -> None:
    """A cached token stays good for its seconds; one never seen does not pass."""
    endpoint = Endpoint(world)
    async with endpoint.open():
        context = calling(world, endpoint)
        channel, _kinds, _log = await context.__aenter__()
        assert await outcome(channel, ONE, GOOD) == ("OK", "")
    try:
        assert await outcome(channel, ONE, GOOD) == ("OK", "")
        assert await outcome(channel, ONE, bearer("new")) == FAILED
    finally:
        await context.__aexit__(None, None, None)


@pytest.mark.slow
async def test_a_token_that_ends_while_it_is_cached_does_not_pass(world: RpcWorld) -> None:
    """Its own end counts at every call, not only the entry's."""
    endpoint = Endpoint(world)
    endpoint.life_s = 2.0
    async with endpoint.open(), calling(world, endpoint) as (channel, _kinds, _log):
        end = time.time() + 3.0
        assert await outcome(channel, ONE, GOOD) == ("OK", "")
        endpoint.life_s = -10.0
        answers = []
        while time.time() < end:
            answers.append(await outcome(channel, ONE, GOOD))
    assert answers[0] == ("OK", "") and answers[-1] == INACTIVE
    assert answers == sorted(answers, key=lambda answer: answer != ("OK", ""))
