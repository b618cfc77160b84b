"""
Who the CLI is: its client leaf, the CA it trusts, and the key that signs its assertions.
"""

from __future__ import annotations

import ssl
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import jwt

from clawker_cp.errors import Unavailable

CLIENT_ID = "clawker-cli"
ASSERTION_LIFE_S = 30
FILES = ("ca/ca.pem", "cli/client.pem", "cli/client.key", "cli/signing.key")


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
                code="NO_IDENTITY",
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
            return jwt.encode(claims, self.read("cli/signing.key"), algorithm="ES256")
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            path = self.root / "cli/signing.key"
            raise Unavailable(f"{path} is no P-256 key", code="NO_IDENTITY") from error.__cause__

    def token_tls(self) -> ssl.SSLContext:
        """
        TLS towards the token endpoint: the CA alone, TLS 1.3.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_verify_locations(cadata=self.read("ca/ca.pem").decode())
        except (ssl.SSLError, ValueError) as error:
            raise Unavailable(f"{self.root / 'ca/ca.pem'} is no certificate", code="NO_IDENTITY") from error
        return context
