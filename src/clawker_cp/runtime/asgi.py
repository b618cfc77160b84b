"""
A small ASGI application: a table of paths, bounded bodies, JSON answers.

Enough for the token endpoints, `/healthz` and `/metrics`; served by `listeners`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import orjson
import structlog

log = structlog.get_logger()

MAX_BODY_BYTES = 16 * 1024
JSON = "application/json;charset=UTF-8"
BODY_LIMIT_S = 5.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body (a mapping = JSON, None = empty) and further headers."""

    status: int
    body: Mapping[str, Any] | bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal(status: int, error: str, text: str, **headers: str) -> Answer:
    """
    An OAuth2 error answer (RFC 6749 5.2).
    """
    return Answer(status, {"error": error, "error_description": text}, headers)


def unavailable(text: str) -> Answer:
    """
    What is heard by who comes too early, or while a server behind this one is gone; it may come again.
    """
    return refusal(503, "temporarily_unavailable", text, **{"Retry-After": "1"})


@dataclass(frozen=True, slots=True)
class Request:
    """One request, its body read whole within bounds."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    content_type: str
    body: bytes
    peer: str


Handler = Callable[[Request], Awaitable[Answer]]


class Application:
    """
    An ASGI application over a table of (path, method) -> handler.

    A path that ends in `/` serves what is below it. Bodies above `max_body` are 413, and a body that does not
    come within 5 s is 408: a slow sender holds a connection no longer.
    """

    def __init__(self, routes: Mapping[tuple[str, str], Handler], *, max_body: int = MAX_BODY_BYTES) -> None:
        self._routes = routes
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            return
        await _respond(send, await self._answer(scope, receive))

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        path = str(scope["path"])
        methods = {method: handler for (place, method), handler in self._routes.items() if _serves(place, path)}
        if not methods:
            return refusal(404, "invalid_request", "there is nothing here")
        method = str(scope["method"])
        handler = methods.get(method)
        if handler is None:
            return refusal(405, "invalid_request", "the method is not allowed here", Allow=", ".join(sorted(methods)))
        try:
            async with asyncio.timeout(BODY_LIMIT_S):
                body = await self._body(receive)
        except TimeoutError:
            return refusal(408, "invalid_request", "the body took too long", Connection="close")
        if body is None:
            return refusal(413, "invalid_request", "the body is too long", Connection="close")
        headers = {
            bytes(key).decode("latin-1").lower(): bytes(value).decode("latin-1") for key, value in scope["headers"]
        }
        peer = scope.get("client") or ("", 0)
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"), max_num_fields=8)
        request = Request(method, path, query, headers.get("content-type", ""), body, str(peer[0]))
        try:
            return await handler(request)
        except Exception as error:  # the boundary of the server: a bug is a 500, the others go on
            log.error("http_handler_failed", path=path, exc_info=error)
            return refusal(500, "server_error", "the server failed")

    async def _body(self, receive: Receive) -> bytes | None:
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b""
            body += bytes(message.get("body", b""))
            if len(body) > self._max_body:
                return None
            if not message.get("more_body"):
                return body


def _serves(place: str, path: str) -> bool:
    return path == place or (place.endswith("/") and path.startswith(place) and "/" not in path[len(place) :])


async def _respond(send: Send, answer: Answer) -> None:
    body = answer.body if isinstance(answer.body, bytes) else b"" if answer.body is None else orjson.dumps(answer.body)
    said = {"content-type": JSON, "cache-control": "no-store", "pragma": "no-cache", "content-length": str(len(body))}
    said.update({key.lower(): value for key, value in answer.headers.items()})
    headers = [(key.encode(), value.encode()) for key, value in said.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
