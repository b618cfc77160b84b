"""The application as an ASGI callable: bodies are bounded before anybody reads them."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from clawker_cp.runtime import asgi
from clawker_cp.runtime.asgi import Answer, Application, Request


async def echo(request: Request) -> Answer:
    return Answer(200, request.body, {"x-type": request.content_type})


APPLICATION = Application({("/echo", "POST"): echo, ("/below/", "POST"): echo}, max_body=10)


async def call(*chunks: bytes, path: str = "/echo", stuck: bool = False) -> tuple[int, bytes]:
    waiting = list(chunks)
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        if not waiting and stuck:
            await asyncio.Event().wait()
        body = waiting.pop(0) if waiting else b""
        return {"type": "http.request", "body": body, "more_body": bool(waiting) or stuck}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "headers": [], "client": ("::1", 5)}
    await APPLICATION(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


async def test_a_body_in_pieces_is_one_body() -> None:
    """Up to the bound, however it is cut."""
    assert await call(b"12345", b"67890") == (200, b"1234567890")


async def test_a_body_above_the_bound_is_not_collected() -> None:
    """Refused as soon as it is too long."""
    status, body = await call(b"123456", b"78901", b"never read")
    assert status == 413 and b"too long" in body


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow sender gets a time-out."""
    monkeypatch.setattr(asgi, "BODY_LIMIT_S", 0.02)
    status, _ = await call(b"1", stuck=True)
    assert status == 408


@pytest.mark.parametrize(("path", "status"), [("/below/one", 200), ("/below/one/two", 404), ("/below", 404)])
async def test_a_place_with_a_slash_serves_one_level_below(path: str, status: int) -> None:
    """Not itself, and nothing deeper."""
    assert (await call(b"", path=path))[0] == status


async def test_life_is_acknowledged() -> None:
    """Start-up and shutdown messages of the server are answered."""
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = []

    async def receive() -> MutableMapping[str, Any]:
        return dict(messages.pop(0))

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message["type"])

    await APPLICATION({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
