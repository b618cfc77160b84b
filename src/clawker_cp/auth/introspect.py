"""
Asking the token authority what a token is worth (RFC 7662).
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

import httpx
import orjson

from clawker_cp.errors import InvalidInput, Unavailable

LIMIT_S = 5.0
MAX_ANSWER_BYTES = 64 * 1024
# As many as questions are asked at once (`authorizer.QUESTIONS_AT_ONCE`), all kept for the client's five seconds:
# keeping fewer means a TLS handshake for most questions of a burst.
CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class IntrospectionResult:
    """
    The fields of an RFC 7662 answer that we read; `exp` is Unix seconds.
    """

    active: bool
    scope: str = ""
    client_id: str = ""
    sub: str = ""
    exp: int = 0


INACTIVE = IntrospectionResult(active=False)


@runtime_checkable
class Introspector(Protocol):
    """
    Says what a token is worth; safe for concurrent use.
    """

    async def introspect(self, token: str, required_scope: str) -> IntrospectionResult:
        """
        Return a definite answer; raises on anything else. The scope is judged by the caller, so that one
        answer serves every method; an implementation need not send it.
        """
        ...


class HydraIntrospector:
    """
    Introspects at an authority's admin endpoint, `introspect_url`, over kept connections.

    `tls` (an `SSLContext` or a path of CA certificates) says whom to trust; None = the system. The token is
    in the request's body only, never in a log or an error, and never sent in clear text to another machine:
    such a URL raises `InvalidInput`. `aclose` gives the connections back.
    """

    def __init__(self, introspect_url: str, tls: ssl.SSLContext | str | None = None) -> None:
        if not introspect_url.startswith("https://") and not _is_plain_loopback(introspect_url):
            raise InvalidInput("introspect_url: has to be https://, or http:// to this machine's loopback")
        self._url = introspect_url
        self._tls = tls
        self._client: httpx.AsyncClient | None = None

    async def introspect(self, token: str, required_scope: str) -> IntrospectionResult:
        """
        Ask, within 5 s. Raises `Unavailable` for anything but a definite answer (I10).
        """
        client = self._client or self._connect()
        body = b""
        try:
            async with asyncio.timeout(LIMIT_S), client.stream("POST", self._url, data={"token": token}) as answer:
                # A length that is told is believed before anything is read; an untold one is read to its end, within
                # the limit, because leaving the stream in the middle would leave its generators behind.
                if _too_long(answer.headers.get("content-length", "0")):
                    raise Unavailable("the token authority's answer is too long")
                async for chunk in answer.aiter_bytes():
                    body += chunk if len(body) <= MAX_ANSWER_BYTES else b""
                status = answer.status_code
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            # The request, and so the token, hangs on the exception: only its kind is passed on.
            raise Unavailable(f"the token authority did not answer: {type(error).__name__}") from None
        if len(body) > MAX_ANSWER_BYTES:
            raise Unavailable("the token authority's answer is too long")
        if status != httpx.codes.OK:
            raise Unavailable(f"the token authority answered {status}")
        return read_answer(body)

    async def aclose(self) -> None:
        """
        Close the connections; a later question opens new ones.
        """
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _connect(self) -> httpx.AsyncClient:
        verify = self._tls
        if not isinstance(verify, ssl.SSLContext):
            verify = ssl.create_default_context(cafile=verify)
            verify.minimum_version = ssl.TLSVersion.TLSv1_3
        self._client = httpx.AsyncClient(
            verify=verify,
            timeout=LIMIT_S,
            follow_redirects=False,
            trust_env=False,
            headers={"accept": "application/json", "accept-encoding": "identity"},
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
        )
        return self._client


def _is_plain_loopback(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and (
            parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
        )
    except ValueError:
        return False


def _too_long(content_length: str) -> bool:
    return content_length.isdigit() and (len(content_length) > 9 or int(content_length) > MAX_ANSWER_BYTES)


def read_answer(body: bytes) -> IntrospectionResult:
    """
    Read an introspection answer. An active one needs `exp` and `client_id`; raises `Unavailable` if malformed.
    """
    try:
        answer: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Unavailable("the token authority's answer is not JSON") from error
    if not isinstance(answer, dict) or not isinstance(answer.get("active"), bool):
        raise Unavailable("the token authority's answer says nothing of `active`")
    if not answer["active"]:
        return INACTIVE
    client_id, exp = answer.get("client_id"), answer.get("exp")
    if not isinstance(client_id, str) or not client_id or not isinstance(exp, int) or isinstance(exp, bool):
        raise Unavailable("the token authority's answer lacks `client_id` or `exp`")
    scope, sub = answer.get("scope", ""), answer.get("sub", "")
    if not isinstance(scope, str) or not isinstance(sub, str):
        raise Unavailable("the token authority's answer has a `scope` or `sub` that is no text")
    return IntrospectionResult(active=True, scope=scope, client_id=client_id, sub=sub, exp=exp)
