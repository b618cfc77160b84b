"""
What Hydra needs that our own authority does not: a signing key of the right kind, and our bar list.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial

import httpx
import structlog

from clawker_cp.auth.authority.ledger import Ledger
from clawker_cp.auth.authority.service import TOKEN_LIFE_S
from clawker_cp.errors import Unavailable
from clawker_cp.runtime.tasks import in_thread_to_the_end

log = structlog.get_logger()

LIMIT_S = 10.0
KEY_SET = "hydra.jwt.access-token"
KEY = {"alg": "ES256", "use": "sig", "kid": "at1"}


async def ensure_access_token_key(admin_url: str, tls: ssl.SSLContext) -> None:
    """
    Make the key that access tokens are signed with, if there is none.

    Left alone Hydra makes an RSA key at the first exchange, which takes up to two seconds and halves the rate of
    introspection. The answer holds the private key and is never shown. Raises `Unavailable` with the status.
    """
    url = f"{admin_url.rstrip('/')}/admin/keys/{KEY_SET}"
    try:
        async with httpx.AsyncClient(verify=tls, timeout=LIMIT_S, trust_env=False) as http:
            known = await http.get(url)
            if known.status_code == httpx.codes.OK and known.json().get("keys"):
                return
            made = await http.post(url, json=KEY)
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable(f"hydra's signing key was not made: {type(error).__name__} from {url}") from None
    if made.status_code != httpx.codes.CREATED:
        raise Unavailable(f"hydra's signing key was not made: {made.status_code} from {url}")


class BarList:
    """
    Tokens that were revoked here, durably: Hydra goes on calling them active, so every answer is checked.

    Fulfils `authorizer.Bars`, and what ControlService revokes by.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._ledger = ledger
        self._wall = wall
        self._sleep = sleep

    def barred(self, token_sha256: bytes, client_id: str, exp: int) -> bool:
        """
        Whether an active token was revoked. Every token lives an hour, so its end tells its beginning.
        """
        digest, issued = token_sha256.hex(), exp - TOKEN_LIFE_S
        return self._ledger.is_barred(jti="", digest=digest, client_id=client_id, iat=issued)

    async def bar(self, kind: str, id_: str) -> None:
        """
        Refuse by `digest` (hex SHA-256 of a token), `client` or `all` what was issued until now.

        Hydra's times are whole seconds: a client or all are answered when the second is over, so that what is issued
        after the answer counts.
        """
        now = int(self._wall())
        await in_thread_to_the_end(partial(self._ledger.bar, kind, id_, now, now + TOKEN_LIFE_S))
        log.info("token_revoked", kind=kind, client=id_ if kind == "client" else "")
        if kind != "digest":
            await self._sleep(min(max(now + 1 - self._wall(), 0.0), 1.0))
