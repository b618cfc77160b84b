"""
P-256 public keys as JSON Web Keys (RFC 7517, RFC 7518 6.2), coordinates always padded to 32 bytes.

A coordinate with a leading zero byte is one in 128: written short it is refused by some readers, and
files on disk may hold it short (D5), so it is padded when read.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import orjson
from cryptography.hazmat.primitives.asymmetric import ec

from clawker_cp.errors import InvalidInput

COORDINATE_BYTES = 32


def public_jwk(key: ec.EllipticCurvePublicKey, *, kid: str = "") -> dict[str, str]:
    """
    The public JWK of a P-256 key, for signatures with ES256.
    """
    numbers = key.public_numbers()
    jwk = {
        "kty": "EC",
        "crv": "P-256",
        "use": "sig",
        "alg": "ES256",
        "x": _encode(numbers.x.to_bytes(COORDINATE_BYTES, "big")),
        "y": _encode(numbers.y.to_bytes(COORDINATE_BYTES, "big")),
    }
    return {**jwk, "kid": kid} if kid else jwk


def thumbprint(jwk: Mapping[str, str]) -> str:
    """
    RFC 7638 thumbprint, base64url of SHA-256.
    """
    canonical = orjson.dumps({name: jwk[name] for name in ("crv", "kty", "x", "y")}, option=orjson.OPT_SORT_KEYS)
    return _encode(hashlib.sha256(canonical).digest())


def read_jwks(data: bytes) -> list[dict[str, str]]:
    """
    Read a JWK or a JWKS of P-256 keys, padded. Raises `InvalidInput` naming what is wrong.
    """
    try:
        document: Any = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidInput("jwk: is not JSON") from error
    items = document.get("keys") if isinstance(document, dict) and "keys" in document else [document]
    if not isinstance(items, list) or not items:
        raise InvalidInput("jwk: holds no key")
    return [_padded(item) for item in items]


def public_key(jwk: Mapping[str, str]) -> ec.EllipticCurvePublicKey:
    """
    The key of a JWK. Raises `InvalidInput` for a point that is not on the curve.
    """
    x, y = (int.from_bytes(_coordinate(jwk, name), "big") for name in ("x", "y"))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError as error:
        raise InvalidInput("jwk: x and y are not a point of P-256") from error


def _padded(item: Any) -> dict[str, str]:
    if not isinstance(item, dict) or item.get("kty") != "EC" or item.get("crv") != "P-256":
        raise InvalidInput("jwk: has to be an EC key of the curve P-256")
    if "d" in item:
        raise InvalidInput("jwk: holds a private key; only the public half belongs here")
    jwk = {
        "kty": "EC",
        "crv": "P-256",
        "use": "sig",
        "alg": "ES256",
        **{name: _encode(_coordinate(item, name)) for name in ("x", "y")},
    }
    public_key(jwk)
    kid = item.get("kid")
    return {**jwk, "kid": kid} if isinstance(kid, str) and kid else jwk


def _coordinate(item: Mapping[str, Any], name: str) -> bytes:
    text = item.get(name)
    try:
        octets = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) if isinstance(text, str) else b""
    except ValueError:
        octets = b""
    if not 0 < len(octets) <= COORDINATE_BYTES:
        raise InvalidInput(f"jwk: {name} is not a base64url number of at most {COORDINATE_BYTES} bytes")
    return octets.rjust(COORDINATE_BYTES, b"\0")


def _encode(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()
