"""A listener in this loop: bound before it serves, bounded while it does, gone when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
import pytest

from clawker_cp.errors import Conflict
from clawker_cp.runtime.asgi import Answer, Application, Handler, Request
from clawker_cp.runtime.listeners import HttpListener


@asynccontextmanager
async def serving(routes: Mapping[tuple[str, str], Handler]) -> AsyncIterator[tuple[HttpListener, str]]:
    listener = HttpListener("test", Application(routes), [("127.0.0.1", 0), ("127.0.0.1", 0)])
    listener.open()
    ports = listener.ports
    async with asyncio.TaskGroup() as group:
        group.create_task(listener.run())
        yield listener, f"http://127.0.0.1:{ports[1]}"
        listener.close()


async def hello(request: Request) -> Answer:
    return Answer(200, {"path": request.path, "peer": request.peer, "query": dict(request.query)})


async def test_plain_http_is_served_on_every_address() -> None:
    """Path, query and peer reach the handler; the reply is JSON that nobody caches."""
    async with serving({("/hello", "GET"): hello}) as (_, url), httpx.AsyncClient() as http:
        answer = await http.get(f"{url}/hello?verbose=1")
        assert answer.json() == {"path": "/hello", "peer": "127.0.0.1", "query": {"verbose": ["1"]}}
        assert answer.headers["cache-control"] == "no-store" and "server" not in answer.headers


async def test_bytes_and_headers_are_sent_as_they_are() -> None:
    """A handler may set its own type and body."""

    async def metrics(_: Request) -> Answer:
        return Answer(200, b"x 1\n", {"Content-Type": "text/plain; version=0.0.4"})

    async with serving({("/metrics", "GET"): metrics}) as (_, url), httpx.AsyncClient() as http:
        answer = await http.get(f"{url}/metrics")
        assert (answer.content, answer.headers["content-type"]) == (b"x 1\n", "text/plain; version=0.0.4")
        assert (await http.post(f"{url}/metrics")).headers["allow"] == "GET"
        assert (await http.get(f"{url}/elsewhere")).status_code == 404


async def test_a_bug_in_a_handler_is_told_to_nobody_outside() -> None:
    """The caller gets a constant, the next request is served."""

    async def broken(_: Request) -> Answer:
        raise RuntimeError("secret detail")

    async with serving({("/a", "GET"): broken, ("/b", "GET"): hello}) as (_, url), httpx.AsyncClient() as http:
        answer = await http.get(f"{url}/a")
        assert answer.status_code == 500 and "secret" not in answer.text
        assert (await http.get(f"{url}/b")).status_code == 200


async def test_an_address_that_is_taken_leaves_none_bound() -> None:
    """All or nothing, and the error names it."""
    first = HttpListener("first", Application({}), [("127.0.0.1", 0)])
    first.open()
    port = first.ports[0]
    second = HttpListener("health", Application({}), [("127.0.0.1", 0), ("127.0.0.1", port)])
    with pytest.raises(Conflict, match=f"health: cannot listen on 127.0.0.1:{port}: Address already in use"):
        second.open()
    assert second.ports == []
    first.close()
    second.open()
    assert second.ports[1] == port
    second.close()
