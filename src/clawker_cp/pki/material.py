"""
A listener's certificate as bytes and as an SSL context, taken over when the files change.
"""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from clawker_cp.pki.certificates import load_identity
from clawker_cp.pki.tree import CA, SERVER, AuthTree, Place


@dataclass(frozen=True, slots=True)
class Material:
    """One generation of a listener's files; `mark` changes with any of them."""

    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    ca_pem: bytes = b""
    mark: str = ""


class ListenerMaterial:
    """
    The pair of `place` and the CA. `read` is cheap enough to be asked at every handshake.

    A pair that is being replaced, or is broken, is not taken over: the last good one stays.
    """

    def __init__(self, tree: AuthTree, place: Place = SERVER) -> None:
        self._certificate = tree.path(place.certificate)
        self._key = tree.path(place.key)
        self._ca = tree.path(CA.certificate)
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._material: Material | None = None
        self._served: WeakKeyDictionary[ssl.SSLContext, str] = WeakKeyDictionary()

    def read(self) -> Material:
        """
        The present generation. Raises `OSError` or `ValueError` only if there never was a good one.
        """
        try:
            stamp = tuple(_stamp(path) for path in (self._certificate, self._key, self._ca))
            if self._material is None or stamp != self._stamp:
                certificate, key, ca = (path.read_bytes() for path in (self._certificate, self._key, self._ca))
                load_identity(certificate, key)
                mark = hashlib.sha256(certificate + ca).hexdigest()
                self._material = Material(certificate, key, ca, mark)
                self._stamp = stamp
        except (OSError, ValueError):
            if self._material is None:
                raise
        return self._material

    def server_context(self) -> ssl.SSLContext:
        """
        A context for an asyncio listener: TLS 1.3, HTTP/1.1, no client certificate asked for.
        """
        mark = self.read().mark
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._certificate, self._key)
        self._served[context] = mark
        return context

    def refresh(self, context: ssl.SSLContext) -> bool:
        """
        Give a context the present pair if it changed; new handshakes use it, connections go on.
        """
        # Not against what was read last: probes read too, and would hide the change from here.
        mark = self.read().mark
        if self._served.get(context) == mark:
            return False
        context.load_cert_chain(self._certificate, self._key)
        self._served[context] = mark
        return True

    def client_context(self) -> ssl.SSLContext:
        """
        A context that trusts the CA alone, for probes and for our own introspection.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self.read().ca_pem.decode())
        return context


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
