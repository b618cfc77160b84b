"""
The authority's endpoints as two ASGI applications: what everybody may ask, and what only this host may.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import orjson
import structlog

from clawker_cp.auth.authority.assertions import Client
from clawker_cp.auth.authority.registration import read_registration
from clawker_cp.auth.authority.service import MAX_BODY_BYTES, Answer, TokenAuthority, read_form, refusal
from clawker_cp.errors import InvalidInput

log = structlog.get_logger()

BODY_LIMIT_S = 5.0
MAX_CLIENT_BYTES = 64 * 1024

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


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
        except Exception as error:
            log.error("authority_failed", path=path, exc_info=error)
            return refusal(500, "server_error", "the authority failed")

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


def public_application(authority: TokenAuthority, jwks: Mapping[str, Any]) -> Application:
    """
    What is served on 4444: token, revocation, keys, metadata, health.
    """

    async def token(request: Request) -> Answer:
        return await authority.exchange(request.content_type, request.body, request.peer)

    async def revoke(request: Request) -> Answer:
        return await authority.revocation(request.content_type, request.body, request.peer)

    async def keys(_: Request) -> Answer:
        return Answer(200, jwks)

    async def metadata(_: Request) -> Answer:
        base = authority.issuer.rstrip("/")
        return Answer(
            200,
            {
                "issuer": authority.issuer,
                "token_endpoint": f"{base}/oauth2/token",
                "revocation_endpoint": f"{base}/oauth2/revoke",
                "jwks_uri": f"{base}/.well-known/jwks.json",
                "grant_types_supported": ["client_credentials"],
                "response_types_supported": ["token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
                "token_endpoint_auth_methods_supported": ["private_key_jwt"],
                "token_endpoint_auth_signing_alg_values_supported": ["ES256"],
            },
        )

    return Application(
        {
            ("/oauth2/token", "POST"): token,
            ("/oauth2/revoke", "POST"): revoke,
            ("/.well-known/jwks.json", "GET"): keys,
            ("/.well-known/openid-configuration", "GET"): metadata,
            **_health(authority),
        }
    )


def admin_application(authority: TokenAuthority) -> Application:
    """
    What is served on 4445, to this host alone: clients, introspection, deletion of tokens, health.
    """

    async def create(request: Request) -> Answer:
        client, document = _registration(authority, request)
        if authority.client(client.id) is not None:
            return refusal(409, "invalid_request", "the client exists")
        authority.put_client(client, document)
        return Answer(201, document)

    async def one(request: Request) -> Answer:
        document = authority.client(request.path.rsplit("/", 1)[1])
        return Answer(200, document) if document is not None else refusal(404, "invalid_request", "no such client")

    async def replace(request: Request) -> Answer:
        client, document = _registration(authority, request)
        if client.id != request.path.rsplit("/", 1)[1]:
            return refusal(400, "invalid_request", "client_id differs from the path")
        authority.put_client(client, document)
        return Answer(200, document)

    async def introspect(request: Request) -> Answer:
        return authority.introspection(read_form(request.content_type, request.body))

    async def delete(request: Request) -> Answer:
        wanted = request.query.get("client_id", [])
        if len(wanted) != 1:
            return refusal(400, "invalid_request", "client_id is missing")
        await authority.bar("client", wanted[0])
        return Answer(204)

    def refusing(handler: Handler) -> Handler:
        async def guarded(request: Request) -> Answer:
            try:
                return await handler(request)
            except InvalidInput as error:
                return refusal(400, "invalid_client_metadata", error.message)

        return guarded

    return Application(
        {
            ("/admin/clients", "POST"): refusing(create),
            ("/admin/clients/", "GET"): one,
            ("/admin/clients/", "PUT"): refusing(replace),
            ("/admin/oauth2/introspect", "POST"): introspect,
            ("/admin/oauth2/tokens", "DELETE"): delete,
            **_health(authority),
        },
        max_body=MAX_CLIENT_BYTES,
    )


def _registration(authority: TokenAuthority, request: Request) -> tuple[Client, Mapping[str, Any]]:
    return read_registration(request.body, authority.life_of)


def _health(authority: TokenAuthority) -> dict[tuple[str, str], Handler]:
    async def alive(_: Request) -> Answer:
        return Answer(200, {"status": "ok"})

    async def ready(_: Request) -> Answer:
        return Answer(200, {"status": "ok"}) if authority.ready else Answer(503, {"status": "starting"})

    return {("/health/alive", "GET"): alive, ("/health/ready", "GET"): ready}


def _serves(place: str, path: str) -> bool:
    return path == place or (place.endswith("/") and path.startswith(place) and "/" not in path[len(place) :])


async def _respond(send: Send, answer: Answer) -> None:
    body = b"" if answer.body is None else orjson.dumps(answer.body)
    headers = [
        (b"content-type", b"application/json;charset=UTF-8"),
        (b"cache-control", b"no-store"),
        (b"pragma", b"no-cache"),
        (b"content-length", str(len(body)).encode()),
        *((key.lower().encode(), value.encode()) for key, value in answer.headers.items()),
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
