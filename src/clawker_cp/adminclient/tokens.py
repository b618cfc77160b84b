"""
Access tokens of the CLI: fetched when first needed, kept until half a minute before their end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httpx
import orjson

from clawker_cp.adminclient.identity import ClientIdentity
from clawker_cp.errors import Unauthenticated, Unavailable

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
REFRESH_MARGIN_S = 30.0
FIRST_LIMIT_S = 15.0
RETRY_S = 0.5
REQUEST_LIMIT_S = 5.0
DEFAULT_LIFE_S = 3600
MAX_ANSWER_BYTES = 64 * 1024


class TokenSource:
    """
    Fetches and keeps one token; concurrent callers share one exchange.

    `audience` is what assertions are for, `url` where they go: behind a forwarded port the two differ.
    """

    def __init__(
        self,
        identity: ClientIdentity,
        *,
        url: str,
        audience: str,
        scope: str = "admin",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._url = url
        self._audience = audience
        self._scope = scope
        self._monotonic = monotonic
        self._token = ""
        self._until = 0.0
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"TokenSource({self._url!r})"

    async def token(self) -> str:
        """
        A token with at least half a minute left; the first is tried for 15 s, every half second.

        Raises `Unauthenticated` when the authority refuses us, `Unavailable` when it cannot be reached.
        """
        async with self._lock:
            if not self._token or self._monotonic() >= self._until - REFRESH_MARGIN_S:
                await self._fetch()
            return self._token

    def discard(self, token: str) -> None:
        """
        Forget a token that was refused, if it is still the one that is kept.
        """
        if token == self._token:
            self._token = ""

    async def _fetch(self) -> None:
        give_up = self._monotonic() + FIRST_LIMIT_S
        while True:
            try:
                self._token, life_s = await self._exchange()
                self._until = self._monotonic() + life_s
                return
            except Unavailable:
                if self._monotonic() + RETRY_S >= give_up:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _exchange(self) -> tuple[str, float]:
        form = {
            "grant_type": "client_credentials",
            "client_assertion_type": ASSERTION_TYPE,
            "client_assertion": self._identity.assertion(self._audience),
            "scope": self._scope,
        }
        tls = self._identity.token_tls()
        try:
            async with httpx.AsyncClient(verify=tls, timeout=REQUEST_LIMIT_S, trust_env=False) as http:
                answer = await http.post(self._url, data=form, extensions={"sni_hostname": "clawker-controlplane"})
        except (httpx.HTTPError, OSError) as error:
            # The request holds the assertion and hangs on the exception: only its kind is passed on.
            raise Unavailable(
                f"the token endpoint {self._url} did not answer: {type(error).__name__}",
                hint="is the control plane running? `clawker-cp serve`",
            ) from None
        if answer.status_code in {400, 401, 403}:
            raise Unauthenticated(
                f"the token endpoint refused this client: {_error(answer.content)}",
                hint="is cli/signing.key the one the control plane knows? `clawkerctl auth status`",
            )
        if answer.status_code != httpx.codes.OK:
            raise Unavailable(f"the token endpoint answered {answer.status_code}")
        return _read(answer.content)


def _read(body: bytes) -> tuple[str, float]:
    try:
        said = orjson.loads(body) if len(body) <= MAX_ANSWER_BYTES else None
    except orjson.JSONDecodeError:
        said = None
    token = said.get("access_token") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(token, str) or not token:
        raise Unavailable("the token endpoint's answer holds no token")
    life = said.get("expires_in")
    return token, float(life) if isinstance(life, int) and life > 0 else DEFAULT_LIFE_S


def _error(body: bytes) -> str:
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "no reason given"
    error = said.get("error") if isinstance(said, dict) else None
    return error if isinstance(error, str) and error.isidentifier() else "no reason given"
