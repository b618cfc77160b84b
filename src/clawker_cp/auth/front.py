"""
What clients of the token endpoint talk to while Hydra answers (ruling R28).

The front owns the port they know, speaks TLS 1.3 alone, bounds bodies and rates, and lets one exchange through at a
time: parallel ones fail with "database is locked" (one in seven at four threads), and are asked again when they do
all the same. What Hydra says is passed on as it is.
"""

from __future__ import annotations

import asyncio
import random
import ssl

import httpx
import structlog

from clawker_cp.auth.rates import RateLimit, too_many
from clawker_cp.auth.tally import TokenTally
from clawker_cp.runtime.asgi import Answer, Application, Request, unavailable

log = structlog.get_logger()

LIMIT_S = 5.0
TRIES = 3
JITTER_S = (0.02, 0.15)
LOCKED = b"database is locked"
CONNECTIONS = 64
PASSED_ON = ("content-type", "cache-control", "pragma", "www-authenticate")
# Path and the methods it has; everything else of Hydra's public port stays out of reach.
TOKEN = ("/oauth2/token", "POST")
OFFERED = (
    TOKEN,
    ("/oauth2/revoke", "POST"),
    ("/.well-known/jwks.json", "GET"),
    ("/.well-known/openid-configuration", "GET"),
    ("/health/alive", "GET"),
    ("/health/ready", "GET"),
)


class HydraFront:
    """
    Forwards to Hydra's public port at `upstream`, whose certificate `tls` judges.

    `application` is what a listener serves; `aclose` gives the connections back. Until `ready` is set, which is for
    whoever registers our clients to do, posts are 503: a client that is refused does not come again.
    """

    def __init__(self, upstream: str, tls: ssl.SSLContext, *, exchanges_per_s: int) -> None:
        self._upstream = upstream.rstrip("/")
        self._tls = tls
        self._rate = RateLimit(exchanges_per_s)
        self._client: httpx.AsyncClient | None = None
        self._one_at_a_time = asyncio.Lock()
        self.ready = False
        self.repeated = 0
        self.tally = TokenTally()

    def application(self) -> Application:
        """
        The endpoints that are offered; posts are counted against the rate of their address.
        """
        return Application({**dict.fromkeys(OFFERED, self._answer), TOKEN: self._token})

    async def aclose(self) -> None:
        """
        Close the connections to Hydra; a later request opens new ones.
        """
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _token(self, request: Request) -> Answer:
        answer = await self._answer(request)
        self.tally.count(answer.status, answer.body)
        return answer

    async def _answer(self, request: Request) -> Answer:
        if request.method == "POST":
            if not self.ready:
                return unavailable("the authority is starting")
            if not self._rate.admits(request.peer):
                return too_many()
        try:
            async with asyncio.timeout(LIMIT_S):
                if request.method == "POST":
                    async with self._one_at_a_time:
                        said = await self._ask(request)
                else:
                    said = await self._ask(request)
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            log.warning("token_authority_silent", cause=type(error).__name__)
            return unavailable("the authority does not answer")
        return Answer(said.status_code, said.content, {k: v for k, v in said.headers.items() if k in PASSED_ON})

    async def _ask(self, request: Request) -> httpx.Response:
        client = self._client or self._connect()
        headers = {"content-type": request.content_type} if request.content_type else {}
        left = TRIES
        while True:
            left -= 1
            said = await client.request(
                request.method, self._upstream + request.path, content=request.body, headers=headers
            )
            if said.status_code != httpx.codes.INTERNAL_SERVER_ERROR or LOCKED not in said.content or not left:
                return said
            # The assertion's number was to be spent in the transaction that failed: it still counts.
            self.repeated += 1
            await asyncio.sleep(random.uniform(*JITTER_S))  # noqa: S311  # spreads repetitions, guards nothing

    def _connect(self) -> httpx.AsyncClient:
        self._client = httpx.AsyncClient(
            verify=self._tls,
            timeout=LIMIT_S,
            trust_env=False,
            follow_redirects=False,
            headers={"accept-encoding": "identity"},
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
        )
        return self._client
