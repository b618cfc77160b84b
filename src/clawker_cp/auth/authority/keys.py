"""
Signing keys that outlive the process, so that tokens do (D6).
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawker_cp.errors import Unavailable
from clawker_cp.runtime.durable import write_durably


def signing_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """
    The P-256 key in `path`, made on first use, mode 0600.

    Raises `Unavailable` for a file that holds something else: a new key by accident would end every token.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        key = ec.generate_private_key(ec.SECP256R1())
        write_durably(
            path,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            ),
            0o600,
        )
        return key
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}") from error
    try:
        loaded = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        loaded = None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or not isinstance(loaded.curve, ec.SECP256R1):
        raise Unavailable(f"{path} holds no P-256 key", hint="restore it, or remove it: then all tokens end")
    path.chmod(0o600)
    return loaded
