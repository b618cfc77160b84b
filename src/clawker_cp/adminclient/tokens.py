"""
Access tokens of the CLI: fetched when first needed, kept until half a minute before their end.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Callable

import httpx
import orjson

from clawker_cp.adminclient.identity import SERVER_NAME, ClientIdentity
from clawker_cp.errors import Unauthenticated, Unavailable

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
REFRESH_MARGIN_S = 30.0
FIRST_LIMIT_S = 15.0
RETRY_S = 0.5
REQUEST_LIMIT_S = 5.0
DEFAULT_LIFE_S = 3600
MAX_ANSWER_BYTES = 64 * 1024
MAX_TOKEN_BYTES = 8 * 1024
UNTRUSTED = "SERVER_UNTRUSTED"
# RFC 6750. Anything else is no header value, and gRPC would fail on it outside its own error types.
_BEARER = re.compile(r"[A-Za-z0-9._~+/-]+=*")


class TokenSource:
    """
    Fetches and keeps one token; concurrent callers share one exchange, and its failure.

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
        self._failures = 0
        self._failure: Unavailable | Unauthenticated | None = None

    def __repr__(self) -> str:
        return f"TokenSource({self._url!r})"

    async def token(self) -> str:
        """
        A token with at least half a minute left; the first is tried for 15 s, every half second.

        Raises `Unauthenticated` when the authority refuses us, `Unavailable` when it cannot be reached.
        Neither a refusal nor an unusable file of our own nor a server we do not trust is tried again.
        """
        failures = self._failures
        async with self._lock:
            if self._token and self._monotonic() < self._until - REFRESH_MARGIN_S:
                return self._token
            if self._failure is not None and self._failures != failures:
                # It failed while we waited for it: trying in turn would add up to minutes.
                raise type(self._failure)(self._failure.message, code=self._failure.code, hint=self._failure.hint)
            try:
                await self._fetch()
            except (Unavailable, Unauthenticated) as error:
                self._failures += 1
                self._failure = error.with_traceback(None)
                raise
            self._failure = None
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
            except Unavailable as error:
                if error.code != Unavailable.code or self._monotonic() + RETRY_S >= give_up:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _exchange(self) -> tuple[str, float]:
        form = {
            "grant_type": "client_credentials",
            "client_assertion_type": ASSERTION_TYPE,
            "client_assertion": self._identity.assertion(self._audience),
            "scope": self._scope,
        }
        status, body = await self._post(form)
        if status in {400, 401, 403}:
            raise Unauthenticated(
                f"the token endpoint refused this client: {_error(body)}",
                hint="is cli/signing.key the one the control plane knows? `clawkerctl auth status`",
            )
        if status != httpx.codes.OK:
            raise Unavailable(f"the token endpoint answered {status}")
        return _read(body)

    async def _post(self, form: dict[str, str]) -> tuple[int, bytes]:
        """
        Status and body, of which no more than a little above the bound is read.
        """
        tls = self._identity.token_tls()
        body = bytearray()
        try:
            # httpx limits each read; one byte every few seconds would be waited for without end.
            async with (
                asyncio.timeout(REQUEST_LIMIT_S),
                httpx.AsyncClient(verify=tls, timeout=REQUEST_LIMIT_S, trust_env=False) as http,
                http.stream("POST", self._url, data=form, extensions={"sni_hostname": SERVER_NAME}) as answer,
            ):
                async for chunk in answer.aiter_raw(MAX_ANSWER_BYTES):
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        break
            return answer.status_code, bytes(body)
        except (httpx.HTTPError, OSError) as error:
            failure = self._unreachable(error)
        # Raised out here: the request holds the assertion and hangs on the exception, also as its context (I11).
        raise failure

    def _unreachable(self, error: BaseException) -> Unavailable:
        if _has_bad_certificate(error):
            return Unavailable(
                f"the token endpoint {self._url} shows a certificate that ca/ca.pem does not cover",
                code=UNTRUSTED,
                hint="is this the auth tree of that control plane? `clawkerctl auth status`",
            )
        return Unavailable(
            f"the token endpoint {self._url} did not answer: {type(error).__name__}",
            hint="is the control plane running? `clawker-cp serve`",
        )


def _has_bad_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _read(body: bytes) -> tuple[str, float]:
    try:
        said = orjson.loads(body) if len(body) <= MAX_ANSWER_BYTES else None
    except orjson.JSONDecodeError:
        said = None
    token = said.get("access_token") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(token, str) or not token:
        raise Unavailable("the token endpoint's answer holds no token")
    if len(token) > MAX_TOKEN_BYTES or not _BEARER.fullmatch(token):
        raise Unavailable("the token endpoint's answer holds no usable token")
    life = said.get("expires_in")
    return token, float(life) if isinstance(life, int) and life > 0 else DEFAULT_LIFE_S


def _error(body: bytes) -> str:
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "no reason given"
    error = said.get("error") if isinstance(said, dict) else None
    return error if isinstance(error, str) and error.isidentifier() else "no reason given"
