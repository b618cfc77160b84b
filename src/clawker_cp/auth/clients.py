"""
Registering our two OAuth2 clients at the authority's admin API, embedded or Hydra (contract 3.1, 3.5).
"""

from __future__ import annotations

import ssl
from typing import Any

import httpx
import orjson

from clawker_cp.auth.authority.registration import registration
from clawker_cp.auth.scopes import ADMIN, AGENT_CLIENT, CLI_CLIENT, REGISTER
from clawker_cp.errors import Unavailable
from clawker_cp.runtime.jwk import read_jwks

LIMIT_S = 10.0
BODY_SHOWN = 200


async def register_cli_client(admin_url: str, jwk_data: bytes | str, tls: ssl.SSLContext | None = None) -> None:
    """
    Make sure `clawker-cli` exists with this key. `jwk_data` is the JSON of the public JWK or JWKS.

    409 is success; a client whose keys differ from ours is replaced, since the authority's file outlives a
    re-minted key. Raises `Unavailable` naming client, status and body.
    """
    await _register(admin_url, registration(CLI_CLIENT, ADMIN, jwk_data), tls)


async def register_agent_client(admin_url: str, jwk_data: bytes | str, tls: ssl.SSLContext | None = None) -> None:
    """
    Make sure `clawker-agent` exists; like `register_cli_client`. A second key has the kid `sandbox` and comes
    second: an assertion without a kid is tried against the first key only.
    """
    await _register(admin_url, registration(AGENT_CLIENT, REGISTER, jwk_data), tls)


async def _register(admin_url: str, document: dict[str, Any], tls: ssl.SSLContext | None) -> None:
    client_id = document["client_id"]
    base = f"{admin_url.rstrip('/')}/admin/clients"
    try:
        async with httpx.AsyncClient(
            verify=tls or ssl.create_default_context(), timeout=LIMIT_S, trust_env=False
        ) as http:
            made = await http.post(base, json=document)
            if made.status_code == httpx.codes.CREATED:
                return
            if made.status_code != httpx.codes.CONFLICT:
                raise _refused(client_id, made)
            known = await http.get(f"{base}/{client_id}")
            if known.status_code == httpx.codes.OK and _same_keys(known.content, document):
                return
            replaced = await http.put(f"{base}/{client_id}", json=document)
            if replaced.status_code == httpx.codes.OK:
                return
            raise _refused(client_id, replaced)
    except httpx.HTTPError as error:
        raise Unavailable(f"client {client_id} was not registered: {type(error).__name__} from {base}") from error


def _refused(client_id: str, answer: httpx.Response) -> Unavailable:
    # A success holds generated secrets and is never shown; a refusal says why.
    body = answer.text[:BODY_SHOWN] if answer.is_error else ""
    return Unavailable(f"client {client_id} was not registered: {answer.status_code} {body}".rstrip())


def _same_keys(body: bytes, document: dict[str, Any]) -> bool:
    try:
        known = orjson.loads(body)
        keys = read_jwks(orjson.dumps(known.get("jwks")))
    except (ValueError, AttributeError):
        return False
    return bool(keys == document["jwks"]["keys"]) and bool(known.get("scope") == document["scope"])
