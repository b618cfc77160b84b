"""
Who is at the other end of a call, as TLS attests it: version, leaf, common name. Judges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

TLS_VERSION = b"TLSv1.3"
# Certificates seen lately; an agent has one of its own.
REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Peer:
    """
    The leaf a caller proved to hold: `der`, its SHA-256, its common name ("" unless there is exactly one), and the
    URIs of its alternative names in their order.
    """

    common_name: str
    thumbprint: bytes
    der: bytes
    uris: tuple[str, ...] = ()


def peer_of(context: Any) -> Peer | None:
    """
    The caller of a grpc.aio call; None without TLS 1.3 (contract 4.3) or without a client certificate.
    """
    facts = context.auth_context()
    pems = facts.get("x509_pem_cert")
    if not pems or len(pems) != 1 or facts.get("ssl_tls_version") != [TLS_VERSION]:
        return None
    return read_leaf(pems[0])


@lru_cache(REMEMBERED)
def read_leaf(pem: bytes) -> Peer | None:
    """
    Read a PEM certificate; None if it is none. Whether it is to be trusted was decided by TLS.
    """
    try:
        leaf = x509.load_pem_x509_certificate(pem)
        names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        der = leaf.public_bytes(Encoding.DER)
        uris = tuple(_alternative_names(leaf).get_values_for_type(x509.UniformResourceIdentifier))
    except (ValueError, x509.DuplicateExtension):
        return None
    name = names[0].value if len(names) == 1 else ""
    return Peer(name if isinstance(name, str) else "", sha256(der).digest(), der, uris)


def _alternative_names(leaf: x509.Certificate) -> x509.SubjectAlternativeName:
    try:
        return leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])
