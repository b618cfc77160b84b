"""JWKs: coordinates are always 32 bytes, and nothing private or off the curve is taken."""

from __future__ import annotations

import base64
from functools import cache

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.jwk import public_jwk, public_key, read_jwks, thumbprint


@cache
def keys() -> list[ec.EllipticCurvePublicKey]:
    """Keys of small private numbers, among them some whose coordinate begins with a zero byte."""
    return [ec.derive_private_key(number, ec.SECP256R1()).public_key() for number in range(1, 600)]


def short(octets: int) -> str:
    return base64.urlsafe_b64encode(octets.to_bytes((octets.bit_length() + 7) // 8 or 1, "big")).rstrip(b"=").decode()


def test_some_keys_have_a_short_coordinate() -> None:
    """The cases this is about are among the keys of these tests."""
    assert any(key.public_numbers().x >> 248 == 0 for key in keys())
    assert any(key.public_numbers().y >> 248 == 0 for key in keys())


@given(st.integers(0, 598))
def test_a_key_comes_back_and_coordinates_are_43_characters(index: int) -> None:
    """Written, read and turned into a key again it is the same, also when written short by others."""
    key = keys()[index]
    jwk = public_jwk(key)
    assert len(jwk["x"]) == len(jwk["y"]) == 43 and list(jwk) == ["kty", "crv", "use", "alg", "x", "y"]
    numbers = key.public_numbers()
    unpadded = {**jwk, "x": short(numbers.x), "y": short(numbers.y)}
    for written in (jwk, unpadded, {"keys": [jwk]}, {"keys": [unpadded]}):
        (read,) = read_jwks(orjson.dumps(written))
        assert read == jwk and public_key(read).public_numbers() == numbers


def test_the_thumbprint_is_that_of_the_rfc() -> None:
    """RFC 7638's computation, worked out by hand for one key: kid and use do not count."""
    jwk = public_jwk(keys()[0], kid="x")
    assert thumbprint(jwk) == thumbprint(public_jwk(keys()[0])) and len(thumbprint(jwk)) == 43
    text = f'{{"crv":"P-256","kty":"EC","x":"{jwk["x"]}","y":"{jwk["y"]}"}}'
    import hashlib

    assert thumbprint(jwk) == base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


GOOD = {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"", "not JSON"),
        (b"[]", "P-256"),
        (b'{"keys":[]}', "no key"),
        (b'{"keys":{}}', "no key"),
        (orjson.dumps({**GOOD, "crv": "P-384"}), "P-256"),
        (orjson.dumps({**GOOD, "kty": "RSA"}), "P-256"),
        (orjson.dumps({**GOOD, "d": "AA"}), "private"),
        (orjson.dumps({**GOOD, "x": 5}), "x is not"),
        (orjson.dumps({**GOOD, "x": ""}), "x is not"),
        (orjson.dumps({**GOOD, "x": "A" * 60}), "x is not"),
        (orjson.dumps({**GOOD, "y": "!!"}), "y is not"),
        (orjson.dumps(GOOD), "not a point"),
    ],
)
def test_garbage_is_named(document: bytes, said: str) -> None:
    """What is wrong is said, and nothing of a key is quoted."""
    with pytest.raises(InvalidInput, match=said):
        read_jwks(document)


def test_a_kid_is_kept() -> None:
    """The second key of a client is told apart by it."""
    (read,) = read_jwks(orjson.dumps(public_jwk(keys()[0], kid="sandbox")))
    assert read["kid"] == "sandbox"
