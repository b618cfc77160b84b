"""
What the authority decides: exchanges, introspection, revocation, clients. No HTTP, no sockets.

Error texts are constants and never repeat input; the exact cause goes to the log (`token_refused`).
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from clawker_cp.auth.authority.assertions import Client, Rejected, read_assertion
from clawker_cp.auth.authority.ledger import Ledger
from clawker_cp.auth.introspect import INACTIVE, IntrospectionResult
from clawker_cp.auth.rates import RateLimit, too_many
from clawker_cp.auth.scopes import AGENT_CLIENT
from clawker_cp.auth.tally import TokenTally
from clawker_cp.runtime.asgi import MAX_BODY_BYTES, Answer, refusal, unavailable
from clawker_cp.runtime.tasks import in_thread_to_the_end

log = structlog.get_logger()

TOKEN_LIFE_S = 3600
CLI_LIFE_S, AGENT_LIFE_S = 300, 86_460
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
FORM = "application/x-www-form-urlencoded"


class TokenAuthority:
    """
    One per server. `audience` is the `aud` that assertions need; `issuer` goes into tokens.
    """

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        kid: str,
        ledger: Ledger,
        *,
        issuer: str,
        audience: str,
        exchanges_per_s: int = 50,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key = key
        self._kid = kid
        self._ledger = ledger
        self.issuer = issuer
        self.audience = audience
        self._rate = RateLimit(exchanges_per_s, monotonic=monotonic)
        self._wall = wall
        self._clients: dict[str, Client] = {}
        self._documents: dict[str, Mapping[str, Any]] = {}
        self.tally = TokenTally()

    # -- clients -----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether any client can get a token."""
        return bool(self._clients)

    def client(self, client_id: str) -> Mapping[str, Any] | None:
        """The registration document of a client."""
        return self._documents.get(client_id)

    def put_client(self, client: Client, document: Mapping[str, Any]) -> None:
        """
        Register a client or replace it.
        """
        self._clients[client.id] = client
        self._documents[client.id] = document

    def life_of(self, client_id: str) -> int:
        """How long an assertion of a client may live."""
        return AGENT_LIFE_S if client_id == AGENT_CLIENT else CLI_LIFE_S

    # -- tokens ------------------------------------------------------------------------------

    async def exchange(self, content_type: str, body: bytes, peer: str) -> Answer:
        """
        `POST /oauth2/token`: an assertion for an access token.
        """
        answer = await self._exchange(content_type, body, peer)
        self.tally.count(answer.status, answer.body)
        return answer

    async def _exchange(self, content_type: str, body: bytes, peer: str) -> Answer:
        if not self._rate.admits(peer):
            return too_many()
        if not self.ready:
            return unavailable("the authority is starting")
        form = read_form(content_type, body)
        if form is None or "grant_type" not in form:
            return refusal(400, "invalid_request", "the request is malformed")
        if form["grant_type"] != "client_credentials":
            return refusal(400, "unsupported_grant_type", "only client_credentials is offered")
        client = await self._authenticate(form, peer)
        if client is None:
            return refusal(401, "invalid_client", "client authentication failed")
        allowed = client.scope.split(" ")
        wanted = [word for word in form.get("scope", "").split(" ") if word] or allowed
        if any(scope not in allowed for scope in wanted):
            log.warning("token_refused", client=client.id, peer=peer, cause="scope not allowed")
            return refusal(400, "invalid_scope", "the scope is not allowed for this client")
        scope = " ".join(dict.fromkeys(wanted))
        return Answer(
            200,
            {
                "access_token": self._issue(client, scope),
                "expires_in": TOKEN_LIFE_S,
                "scope": scope,
                "token_type": "bearer",
            },
        )

    def inspect(self, token: str) -> Mapping[str, Any] | None:
        """
        The claims of a token of ours that is valid now, None for anything else.
        """
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._key.public_key(),
                algorithms=["ES256"],
                audience="clawker",
                issuer=self.issuer,
                options={"require": ["exp", "iat", "jti", "sub"], "verify_exp": False, "verify_iat": False},
            )
        except (jwt.PyJWTError, ValueError, RecursionError):
            return None
        if not isinstance(claims["exp"], int) or claims["exp"] <= self._wall():
            return None
        digest = sha256(token.encode()).hexdigest()
        barred = self._ledger.is_barred(
            jti=claims["jti"], digest=digest, client_id=claims["sub"], iat=int(claims["iat"])
        )
        return None if barred else claims

    def introspection(self, form: Mapping[str, str] | None) -> Answer:
        """
        `POST /admin/oauth2/introspect` (RFC 7662).
        """
        if form is None or not form.get("token"):
            return refusal(400, "invalid_request", "the request is malformed")
        claims = self.inspect(form["token"])
        asked = [word for word in form.get("scope", "").split(" ") if word]
        if claims is None or any(word not in claims["scope"].split(" ") for word in asked):
            return Answer(200, {"active": False})
        return Answer(
            200,
            {
                "active": True,
                "aud": claims["aud"],
                "client_id": claims["client_id"],
                "exp": claims["exp"],
                "iat": claims["iat"],
                "iss": claims["iss"],
                "jti": claims["jti"],
                "nbf": claims["iat"],
                "scope": claims["scope"],
                "sub": claims["sub"],
                "token_type": "Bearer",
                "token_use": "access_token",
            },
        )

    async def introspect(self, token: str, required_scope: str) -> IntrospectionResult:
        """
        The same for this process itself: fulfils `Introspector`.
        """
        claims = self.inspect(token)
        if claims is None:
            return INACTIVE
        return IntrospectionResult(True, claims["scope"], claims["client_id"], claims["sub"], claims["exp"])

    async def revocation(self, content_type: str, body: bytes, peer: str) -> Answer:
        """
        `POST /oauth2/revoke` (RFC 7009): 200 with an empty body, also for a token nobody knows.
        """
        if not self._rate.admits(peer):
            return too_many()
        form = read_form(content_type, body)
        if form is None or not form.get("token"):
            return refusal(400, "invalid_request", "the request is malformed")
        client = await self._authenticate(form, peer)
        if client is None:
            return refusal(401, "invalid_client", "client authentication failed")
        claims = self.inspect(form["token"])
        if claims is not None and hmac.compare_digest(claims["client_id"], client.id):
            await asyncio.to_thread(self._ledger.bar, "jti", claims["jti"], 0, claims["exp"])
            log.info("token_revoked", client=client.id)
        return Answer(200)

    async def bar(self, kind: str, id_: str) -> None:
        """
        Revoke by `digest` (hex SHA-256 of a token), `client` or `all`, for everything issued until now.
        """
        now = int(self._wall())
        await in_thread_to_the_end(partial(self._ledger.bar, kind, id_, now, now + TOKEN_LIFE_S))
        log.info("token_revoked", kind=kind, client=id_ if kind == "client" else "")

    # -- inner -------------------------------------------------------------------------------

    async def _authenticate(self, form: Mapping[str, str], peer: str) -> Client | None:
        """The client of a form's assertion, whose number is spent now; None and a log line otherwise."""
        try:
            if form.get("client_assertion_type") != ASSERTION_TYPE:
                raise Rejected("wrong assertion type")
            now = self._wall()
            assertion = read_assertion(form.get("client_assertion", ""), self._clients, now)
            spent = await asyncio.to_thread(self._ledger.spend, assertion.jti, assertion.client.id, assertion.exp, now)
            if not spent:
                raise Rejected("jti was used before")
            if assertion.audience != self.audience:
                raise Rejected("wrong aud")
            if form.get("client_id", assertion.client.id) != assertion.client.id:
                raise Rejected("client_id is not sub")
        except Rejected as error:
            log.warning("token_refused", peer=peer, cause=str(error))
            return None
        return assertion.client

    def _issue(self, client: Client, scope: str) -> str:
        now = int(self._wall())
        # Times are whole seconds: what is issued after a revocation is told apart from what it ended.
        issued = max(now, self._ledger.barred_until(client.id) + 1)
        return jwt.encode(
            {
                "iss": self.issuer,
                "sub": client.id,
                "client_id": client.id,
                "aud": ["clawker"],
                "scope": scope,
                "jti": str(uuid.uuid4()),
                "iat": issued,
                "exp": now + TOKEN_LIFE_S,
            },
            self._key,
            algorithm="ES256",
            headers={"typ": "at+jwt", "kid": self._kid},
        )


def read_form(content_type: str, body: bytes) -> dict[str, str] | None:
    """
    Read a form strictly; None for a wrong type, undecodable octets, a repeated parameter or nothing at all.
    """
    if content_type.partition(";")[0].strip().lower() != FORM or len(body) > MAX_BODY_BYTES:
        return None
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict",
                          max_num_fields=32)  # fmt: skip
    except ValueError:
        return None
    form = dict(pairs)
    return form if len(form) == len(pairs) else None
