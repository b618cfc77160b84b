"""Asking a real HTTPS endpoint: only a definite answer counts, and the token stays in the body."""

from __future__ import annotations

import asyncio
import ssl
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clawker_cp.auth import introspect
from clawker_cp.auth.introspect import HydraIntrospector, IntrospectionResult, Introspector, read_answer
from clawker_cp.errors import InvalidInput, Unavailable
from clawker_cp.testing.certificates import TestCa

TOKEN = "secret-token-of-the-test"
ACTIVE = b'{"active":true,"client_id":"clawker-cli","scope":"admin x","sub":"s","exp":99}'
Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def authority(ca: TestCa, answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """An HTTPS endpoint that hands each request to `answer`."""

    served: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await answer(await reader.readexactly(length), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls or ca.server_context())
    try:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}/admin/oauth2/introspect"
    finally:
        server.close()
        for task in served:
            task.cancel()
        if served:
            await asyncio.wait(served)


def says(body: bytes, status: str = "200 OK") -> Answer:
    async def answer(_request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body))

    return answer


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> TestCa:
    return TestCa(tmp_path_factory.mktemp("ca"))


async def ask(url: str, tls: ssl.SSLContext | str | None) -> IntrospectionResult:
    introspector = HydraIntrospector(url, tls)
    assert isinstance(introspector, Introspector)
    try:
        return await introspector.introspect(TOKEN, "admin")
    finally:
        await introspector.aclose()


async def test_an_active_token_is_read(ca: TestCa) -> None:
    """The request holds the token alone, the answer is read into our fields, the CA may be a path."""
    seen = []

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(request)
        await says(ACTIVE)(request, writer)

    async with authority(ca, answer) as url:
        expected = IntrospectionResult(True, "admin x", "clawker-cli", "s", 99)
        assert await ask(url, ca.client_context()) == expected
        assert await ask(url, str(ca.certificate)) == expected
    assert seen == [f"token={TOKEN}".encode()] * 2


async def test_connections_are_kept(ca: TestCa) -> None:
    """A hundred questions one after the other use one connection."""
    peers = set()

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        peers.add(writer.get_extra_info("peername"))
        await says(ACTIVE)(request, writer)

    async with authority(ca, answer) as url:
        introspector = HydraIntrospector(url, ca.client_context())
        for _ in range(100):
            await introspector.introspect(TOKEN, "")
        await introspector.aclose()
    assert len(peers) == 1


async def test_an_answer_without_length_is_read_to_its_bound(ca: TestCa) -> None:
    """What is told piece by piece and grows too long is no answer; closing what was never opened is nothing."""

    async def answer(_request: bytes, writer: asyncio.StreamWriter) -> None:
        piece = b"%x\r\n%s\r\n" % (50_000, b" " * 50_000)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + piece * 4 + b"0\r\n\r\n")

    async with authority(ca, answer) as url:
        with pytest.raises(Unavailable, match="too long"):
            await ask(url, ca.client_context())
    await HydraIntrospector(url, ca.client_context()).aclose()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", "200 OK"),
        (b"no json", "200 OK"),
        (b"[]", "200 OK"),
        (b"{}", "200 OK"),
        (b'{"active":"true"}', "200 OK"),
        (b'{"active":true}', "200 OK"),
        (b'{"active":true,"client_id":"c"}', "200 OK"),
        (b'{"active":true,"client_id":"c","exp":"9"}', "200 OK"),
        (b'{"active":true,"client_id":"c","exp":true}', "200 OK"),
        (b'{"active":true,"client_id":"","exp":9}', "200 OK"),
        (b'{"active":true,"client_id":"c","exp":9,"scope":["admin"]}', "200 OK"),
        (ACTIVE, "201 Created"),
        (ACTIVE, "302 Found"),
        (ACTIVE, "500 Oops"),
        (b" " * 200_000 + ACTIVE, "200 OK"),
    ],
)
async def test_anything_but_a_definite_answer_is_an_error(ca: TestCa, body: bytes, status: str) -> None:
    """Never "inactive", never "active": the caller denies and may ask again."""
    async with authority(ca, says(body, status)) as url:
        with pytest.raises(Unavailable):
            await ask(url, ca.client_context())


async def test_a_server_of_another_ca_is_not_asked(ca: TestCa, tmp_path: Path) -> None:
    """The token never reaches whoever cannot prove to be the authority."""
    seen = []

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(request)

    async with authority(TestCa(tmp_path), answer) as url:
        with pytest.raises(Unavailable):
            await ask(url, ca.client_context())
    assert seen == []


async def test_a_slow_or_absent_authority_is_an_error_in_time(ca: TestCa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a server that never answers nor a port that nobody has keeps the caller."""
    monkeypatch.setattr(introspect, "LIMIT_S", 0.2)

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(10):
        async with authority(ca, answer) as url:
            with pytest.raises(Unavailable):
                await ask(url, ca.client_context())
        with pytest.raises(Unavailable):
            await ask(url, ca.client_context())


async def test_the_token_is_in_no_error(ca: TestCa) -> None:
    """Neither message nor traceback nor chained exceptions of any failure hold it."""
    async with authority(ca, says(b"", "500 x")) as url:
        for target in (url, "https://localhost:1/", "https://[bad"):
            try:
                await ask(target, ca.client_context())
            except Unavailable as error:
                text = "".join(traceback.format_exception(error)) + repr(error.__dict__) + repr(error.__context__)
                assert TOKEN not in text


def test_inactive_is_an_answer() -> None:
    """Exactly false is definite, whatever else is said."""
    assert read_answer(b'{"active":false,"scope":5}') == IntrospectionResult(active=False)


@pytest.mark.parametrize(
    "url",
    [
        "http://192.0.2.1/introspect",
        "http://authority.example/introspect",
        "http:///introspect",
        "http://[bad/",
        "ftp://127.0.0.1/",
        "",
        "https//x",
    ],
)
def test_a_token_is_not_sent_in_clear_text(url: str) -> None:
    """Only this machine's loopback may be asked without TLS; anything else fails when it is set up."""
    with pytest.raises(InvalidInput, match="introspect_url"):
        HydraIntrospector(url)
    for fine in ("http://127.0.0.1:1/x", "http://localhost/x", "http://[::1]/x", "https://authority.example/x"):
        HydraIntrospector(fine)


async def test_an_answer_that_says_it_is_huge_is_not_read(ca: TestCa) -> None:
    """Ten gigabytes announced end the question at once, long before its time limit."""

    async def answer(_request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n" + b" " * 1000)

    async with authority(ca, answer) as url, asyncio.timeout(4):
        with pytest.raises(Unavailable, match="too long"):
            await ask(url, ca.client_context())


async def test_an_endless_answer_ends_with_the_time_limit(ca: TestCa, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never says how long it is costs no memory and no more than the limit."""
    monkeypatch.setattr(introspect, "LIMIT_S", 0.3)

    async def answer(_request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
            await writer.drain()

    async with authority(ca, answer) as url, asyncio.timeout(5):
        with pytest.raises(Unavailable):
            await ask(url, ca.client_context())


async def test_an_authority_below_tls_1_3_is_not_asked(ca: TestCa) -> None:
    """With a CA path the context is ours, and ours demands TLS 1.3."""
    context = ca.server_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with authority(ca, says(ACTIVE), context) as url:
        assert (await ask(url, ca.client_context())).active  # the caller's own context decides for itself
        with pytest.raises(Unavailable, match="did not answer"):
            await ask(url, str(ca.certificate))


@pytest.mark.slow
async def test_many_questions_at_once_are_all_answered(ca: TestCa, monkeypatch: pytest.MonkeyPatch) -> None:
    """More questions than connections are allowed get each its own answer, over no more than those."""
    monkeypatch.setattr(introspect, "CONNECTIONS", 8)
    peers = set()

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        peers.add(writer.get_extra_info("peername"))
        client = request.decode().removeprefix("token=")
        await says(b'{"active":true,"client_id":"%s","exp":99}' % client.encode())(request, writer)

    async with authority(ca, answer) as url:
        introspector = HydraIntrospector(url, ca.client_context())
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(introspector.introspect(f"c{number}", "")) for number in range(40)]
        await introspector.aclose()
    assert [task.result().client_id for task in asked] == [f"c{number}" for number in range(40)]
    assert len(peers) <= introspect.CONNECTIONS
