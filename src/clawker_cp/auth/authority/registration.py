"""
Client registration documents (RFC 7591, as Hydra's admin API takes them). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from clawker_cp.auth.authority.assertions import Client
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.jwk import public_key, read_jwks

KEPT = (
    "client_id",
    "grant_types",
    "token_endpoint_auth_method",
    "token_endpoint_auth_signing_alg",
    "scope",
    "jwks",
)


def registration(client_id: str, scope: str, jwk_data: bytes | str) -> dict[str, Any]:
    """
    The document that registers a client; `jwk_data` is the JSON of a public JWK or JWKS.

    A bare JWK is wrapped, `use` and `alg` are set and coordinates padded: without them Hydra answers 201
    and stores no key. Raises `InvalidInput`.
    """
    return {
        "client_id": client_id,
        "grant_types": ["client_credentials"],
        "token_endpoint_auth_method": "private_key_jwt",
        "token_endpoint_auth_signing_alg": "ES256",
        "scope": scope,
        "jwks": {"keys": read_jwks(jwk_data.encode() if isinstance(jwk_data, str) else jwk_data)},
    }


def read_registration(body: bytes, life_of: Callable[[str], int]) -> tuple[Client, Mapping[str, Any]]:
    """
    Read a document; raises `InvalidInput` naming the field. What is not known is left out of what is kept.
    """
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput("the document is not JSON") from error
    if not isinstance(document, dict):
        raise InvalidInput("the document is not an object")
    client_id, scope = document.get("client_id"), document.get("scope", "")
    if not isinstance(client_id, str) or not 0 < len(client_id) <= 128 or "/" in client_id:
        raise InvalidInput("client_id: is missing or not a name")
    if not isinstance(scope, str) or not scope.strip():
        raise InvalidInput("scope: is missing")
    if document.get("grant_types") != ["client_credentials"]:
        raise InvalidInput("grant_types: only client_credentials is offered")
    if document.get("token_endpoint_auth_method") != "private_key_jwt":
        raise InvalidInput("token_endpoint_auth_method: only private_key_jwt is offered")
    if document.get("token_endpoint_auth_signing_alg", "ES256") != "ES256":
        raise InvalidInput("token_endpoint_auth_signing_alg: only ES256 is offered")
    keys = read_jwks(orjson.dumps(document.get("jwks")))
    client = Client(client_id, scope, [(key.get("kid", ""), public_key(key)) for key in keys], life_of(client_id))
    return client, {name: document[name] for name in KEPT if name in document}
