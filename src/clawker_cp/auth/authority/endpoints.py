"""
The authority's endpoints as two ASGI applications: what everybody may ask, and what only this host may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clawker_cp.auth.authority.assertions import Client
from clawker_cp.auth.authority.registration import read_registration
from clawker_cp.auth.authority.service import TokenAuthority, read_form
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.asgi import Answer, Application, Handler, Request, refusal

MAX_CLIENT_BYTES = 64 * 1024


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
