"""What TLS says of a caller, read without being fooled."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from clawker_cp.rpc.peer import Peer, peer_of, read_leaf
from clawker_cp.testing.certificates import TestCa


class Context:
    """A call with these facts."""

    def __init__(self, facts: dict[str, list[bytes]]) -> None:
        self._facts = facts

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._facts


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return TestCa(tmp_path_factory.mktemp("ca")).leaf("clawker-cli").certificate_pem


def test_the_leaf_is_read(pem: bytes) -> None:
    """Common name, DER and its digest, once per certificate."""
    peer = peer_of(Context({"x509_pem_cert": [pem], "ssl_tls_version": [b"TLSv1.3"]}))
    der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    assert peer == Peer("clawker-cli", hashlib.sha256(der).digest(), der)
    assert read_leaf(pem) is read_leaf(bytes(bytearray(pem)))


@pytest.mark.parametrize(
    "change",
    [
        {"x509_pem_cert": []},
        {"x509_pem_cert": None},
        {"x509_pem_cert": [b"no certificate"]},
        {"x509_pem_cert": [b""]},
        {"ssl_tls_version": [b"TLSv1.2"]},
        {"ssl_tls_version": [b"TLSv1.3", b"TLSv1.2"]},
        {"ssl_tls_version": []},
        {"ssl_tls_version": None},
    ],
)
def test_anything_less_is_nobody(pem: bytes, change: dict[str, Any]) -> None:
    """No certificate, no readable one, or a TLS version that is older or not told."""
    facts = {"x509_pem_cert": [pem], "ssl_tls_version": [b"TLSv1.3"], "x509_common_name": [b"clawker-cli"], **change}
    assert peer_of(Context({key: value for key, value in facts.items() if value is not None})) is None
    assert peer_of(Context({**facts, "x509_pem_cert": [pem, pem]})) is None


@pytest.mark.parametrize("names", [[], ["clawker-cli", "x"], ["x", "clawker-cli"]])
def test_a_common_name_that_is_not_one_is_none(names: list[str], tmp_path: Path) -> None:
    """Two names could be read as either, so they are read as neither."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in names])
    from datetime import UTC, datetime, timedelta

    leaf = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    peer = read_leaf(leaf.public_bytes(serialization.Encoding.PEM))
    assert peer is not None and peer.common_name == ""
