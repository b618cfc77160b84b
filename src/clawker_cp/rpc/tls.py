"""
TLS of the gRPC listeners (contract 4.3): TLS 1.3, a client certificate of our CA, a server leaf that may change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from clawker_cp.rpc.transport import grpc

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What a listener proves itself with, and the CA whose clients it takes. PEM; the key is in no repr (I11)."""

    certificate_chain: bytes
    private_key: bytes = field(repr=False)
    client_ca: bytes


def server_credentials(material: Callable[[], TlsMaterial]) -> grpc.ServerCredentials:
    """
    Credentials that ask `material` at every handshake, so that a renewed leaf is served without a new listener.

    Raises what `material` raises the first time. Later failures are logged and keep the leaf in use. `material` runs on
    a thread of grpc and must not block for long.
    """
    in_use = material()

    def fetch() -> Any:
        nonlocal in_use
        try:
            latest = material()
            if latest == in_use:
                return None
            configuration = _configuration(latest)
        except Exception as error:  # noqa: BLE001 - on a thread of grpc; the present leaf stays
            log.error("grpc_server_certificate_unavailable", cause=f"{type(error).__name__}")
            return None
        in_use = latest
        return configuration

    return grpc.dynamic_ssl_server_credentials(_configuration(in_use), fetch, require_client_authentication=True)


def _configuration(material: TlsMaterial) -> Any:
    pair = (material.private_key, material.certificate_chain)
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=material.client_ca)
