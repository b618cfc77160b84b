"""
Who the CLI is: its client leaf, the CA it trusts, and the key that signs its assertions.
"""

from __future__ import annotations

import datetime as dt
import ssl
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import jwt
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from clawker_cp.errors import Unavailable

CLIENT_ID = "clawker-cli"
SERVER_NAME = "clawker-controlplane"  # in the server's certificate, whatever address it is dialled at
ASSERTION_LIFE_S = 30
CA, LEAF, LEAF_KEY = "ca/ca.pem", "cli/client.pem", "cli/client.key"
SIGNING_KEY = "cli/signing.key"
NO_IDENTITY = "NO_IDENTITY"  # of errors about our own files: nothing is dialled, trying again changes nothing


@dataclass(frozen=True, slots=True)
class ChannelMaterial:
    """
    What a mutually authenticated channel needs, as PEM; it fits together.
    """

    ca: bytes
    key: bytes
    leaf: bytes

    def __repr__(self) -> str:
        return "ChannelMaterial()"


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """
    The auth tree at `root`, as the CLI uses it. Nothing is read before it is needed, and no key is kept.
    """

    root: Path

    def read(self, relative: str) -> bytes:
        """
        One file of the tree. Raises `Unavailable` naming it.
        """
        path = self.root / relative
        try:
            return path.read_bytes()
        except OSError as error:
            raise Unavailable(
                f"{path} cannot be read: {error.strerror}",
                code=NO_IDENTITY,
                hint="`clawkerctl auth init` makes it; it belongs to the user who runs the control plane",
            ) from error

    def assertion(self, audience: str, now: float | None = None) -> str:
        """
        A fresh signed assertion for one exchange (contract 3.3).
        """
        at = int(time.time() if now is None else now)
        claims = {
            "iss": CLIENT_ID,
            "sub": CLIENT_ID,
            "aud": audience,
            "jti": str(uuid.uuid4()),
            "iat": at,
            "exp": at + ASSERTION_LIFE_S,
        }
        try:
            return jwt.encode(claims, self.read(SIGNING_KEY), algorithm="ES256")
        except (jwt.PyJWTError, ValueError, TypeError):
            # The library's error may quote the key.
            raise self._unfit(SIGNING_KEY, "is no P-256 key") from None

    def token_tls(self) -> ssl.SSLContext:
        """
        TLS towards the token endpoint: the CA alone, TLS 1.3.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_verify_locations(cadata=self.read(CA).decode())
        except (ssl.SSLError, ValueError) as error:
            raise self._unfit(CA, "is no certificate") from error
        return context

    def channel_material(self, now: float | None = None) -> ChannelMaterial:
        """
        Read and judge the files of the gRPC channel. Raises `Unavailable` naming the one that will not do.

        gRPC says "Socket closed" about a leaf that the server refuses, and aborts the process at an empty
        key: what can be known here is said here.
        """
        material = ChannelMaterial(self.read(CA), self.read(LEAF_KEY), self.read(LEAF))
        at = dt.datetime.fromtimestamp(time.time() if now is None else now, dt.UTC)
        ca, leaf = self._certificate(CA, material.ca), self._certificate(LEAF, material.leaf)
        try:
            key = serialization.load_pem_private_key(material.key, None)
        except (ValueError, TypeError):
            raise self._unfit(LEAF_KEY, "is no private key") from None
        if key.public_key() != leaf.public_key():
            raise self._unfit(LEAF_KEY, f"is not the key of {LEAF}")
        try:
            leaf.verify_directly_issued_by(ca)
        except (ValueError, TypeError, InvalidSignature):
            raise self._unfit(LEAF, f"was not issued by {CA}") from None
        for name, certificate in ((CA, ca), (LEAF, leaf)):
            if at >= certificate.not_valid_after_utc:
                raise self._unfit(
                    name,
                    f"ended on {certificate.not_valid_after_utc:%Y-%m-%d}",
                    "`clawkerctl auth rotate` makes new certificates",
                )
            if at < certificate.not_valid_before_utc:
                raise self._unfit(
                    name,
                    f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%SZ}",
                    "set this machine's clock",
                )
        return material

    def _certificate(self, relative: str, pem: bytes) -> x509.Certificate:
        try:
            return x509.load_pem_x509_certificate(pem)
        except ValueError as error:
            raise self._unfit(relative, "is no certificate") from error

    def _unfit(self, relative: str, problem: str, hint: str = "`clawkerctl auth status` says what fits") -> Unavailable:
        return Unavailable(f"{self.root / relative} {problem}", code=NO_IDENTITY, hint=hint)
