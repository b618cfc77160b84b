"""
Judging a client's signed assertion (RFC 7523, contract 3.3). No I/O; who has spent a `jti` is asked elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

MAX_ASSERTION_BYTES = 8 * 1024
EARLY_S = 60  # how far `iat` and `nbf` may lie in the future
LATE_S = 10  # how far `exp` may lie in the past
_UNCHECKED = {
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
    "verify_aud": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}


class Rejected(Exception):
    """An assertion that does not count; the message is for the log, never for the caller."""


@dataclass(frozen=True, slots=True)
class Client:
    """
    One OAuth2 client. `keys` are tried by `kid`; an assertion without one is verified by the first.
    """

    id: str
    scope: str
    keys: Sequence[tuple[str, ec.EllipticCurvePublicKey]] = field(repr=False)
    max_life_s: int = 300


@dataclass(frozen=True, slots=True)
class Assertion:
    """A genuine assertion: whose, and the number that may be spent once until `exp`."""

    client: Client
    jti: str
    exp: int
    audience: str


def read_assertion(text: str, clients: Mapping[str, Client], now: float) -> Assertion:
    """
    Verify form, client, signature, times and lifetime; raises `Rejected`. The audience is only read.
    """
    if len(text) > MAX_ASSERTION_BYTES:
        raise Rejected("longer than 8 KiB")
    try:
        header = jwt.get_unverified_header(text)
        claimed: Any = jwt.decode(text, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise Rejected(f"no JWT: {type(error).__name__}") from None
    if header.get("alg") != "ES256" or "crit" in header:
        raise Rejected("alg is not ES256, or crit is set")
    client = clients.get(claimed.get("sub")) if isinstance(claimed.get("sub"), str) else None
    if client is None:
        raise Rejected("unknown client")
    try:
        claims = jwt.decode(text, _key(client, header.get("kid")), algorithms=["ES256"], options=_UNCHECKED)  # type: ignore[arg-type]
    except (jwt.PyJWTError, ValueError) as error:
        raise Rejected(f"signature: {type(error).__name__}") from None
    if claims.get("iss") != client.id:
        raise Rejected("iss is not sub")
    exp = _times(claims, client, now)
    jti = claims.get("jti")
    if not isinstance(jti, str) or not 0 < len(jti) <= 256:
        raise Rejected("jti is missing")
    return Assertion(client, jti, exp, _audience(claims.get("aud")))


def _key(client: Client, kid: Any) -> ec.EllipticCurvePublicKey:
    if kid is None or kid == "":
        return client.keys[0][1]
    for name, key in client.keys:
        if name and name == kid:
            return key
    raise Rejected("unknown kid")


def _times(claims: Mapping[str, Any], client: Client, now: float) -> int:
    exp, iat = claims.get("exp"), claims.get("iat")
    if not _is_time(exp) or not _is_time(iat):
        raise Rejected("exp or iat is missing")
    assert isinstance(exp, int) and isinstance(iat, int)
    if exp < now - LATE_S:
        raise Rejected("expired")
    begins = [iat, *([claims["nbf"]] if "nbf" in claims else [])]
    if not all(_is_time(at) and at <= now + EARLY_S for at in begins):
        raise Rejected("not yet valid")
    if exp - iat > client.max_life_s:
        raise Rejected(f"lives longer than {client.max_life_s} s")
    return exp


def _is_time(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40


def _audience(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else ""
