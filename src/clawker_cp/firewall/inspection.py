"""
The inspection CA and its leaves (contract 8.6): minted once, verified before use, reused.

A policy has two leaves, so that a new name re-mints half of its certificates; a leaf is minted
anew only when its names changed or its end is near. Files live in `certs/`. Synchronous: callers
on the loop go through a thread.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import ipaddress
import secrets
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from clawker_cp.errors import CapacityExceeded, ClawkerError, Unavailable
from clawker_cp.firewall.plan import Plan, Policy
from clawker_cp.runtime.durable import write_durably

CA_NAME = "Clawker Firewall CA"
LEAF_NAME = "clawker egress"
CA_YEARS = 10
CA_WARN = dt.timedelta(days=180)
LEAF_LIFE = dt.timedelta(days=90)
LEAF_RENEW = dt.timedelta(days=30)
MAX_LEAF_BYTES = 48 * 1024  # clients refuse certificate messages above 100 KB (R17)
SHARDS = 2
NOBODY = "none.invalid"
_BACKDATE = dt.timedelta(minutes=5)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Leaf:
    """
    A certificate chain with its key.

    `mark` changes with the certificate. `cert_path`, `key_path`: where the same lies on disk.
    """

    chain_pem: str
    key_pem: str = field(repr=False)
    mark: str = ""
    cert_path: str = ""
    key_path: str = ""


@dataclass(frozen=True, slots=True)
class _Minted:
    names: tuple[str, ...]
    not_after: dt.datetime
    leaf: Leaf


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    cross: x509.Certificate | None = None


def shard_of(name: str) -> int:
    """Return which leaf of a policy holds a certificate name; a wildcard goes with its base."""
    return zlib.crc32(name.removeprefix("*.").encode()) % SHARDS


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class InspectionAuthority:
    """
    The CA in `directory` and the leaves it has signed.

    `open` makes a CA if nothing is there, and refuses one that does not fit together: a new CA by
    accident would break every running agent. One caller at a time.
    """

    def __init__(self, directory: Path, *, now: Callable[[], dt.datetime] = _utc_now) -> None:
        self._directory = directory
        self._now = now
        self._authority: _Authority | None = None
        self._minted: dict[str, _Minted] = {}

    @property
    def certificate_path(self) -> Path:
        """The CA certificate, which images are built with."""
        return self._directory / "ca-cert.pem"

    @property
    def _key_path(self) -> Path:
        return self._directory / "ca-key.pem"

    @property
    def _cross_path(self) -> Path:
        return self._directory / "ca-cross.pem"

    @property
    def _pending_path(self) -> Path:
        return self._directory / "ca-pending.json"

    def open(self) -> None:
        """
        Load and verify the CA, or make it; call again to take over changes on disk.

        Raises `ClawkerError` `CERT_REGEN` naming the files and what is wrong with them.
        """
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory.chmod(0o700)
        self._minted.clear()
        self._finish_keeping()
        if not self.certificate_path.exists() and not self._key_path.exists():
            self._keep(*self._new_ca())
        else:
            certificate, key = self._load()
            self._authority = _Authority(certificate, key, self._load_cross(certificate))
        left = self._ca().certificate.not_valid_after_utc - self._now()
        if left < CA_WARN:
            log.warning("inspection_ca_expiring", days=left.days, path=str(self.certificate_path))

    def certificate_pem(self) -> str:
        """Return the CA certificate that agents have to trust."""
        return _pem(self._ca().certificate)

    def rotate(self) -> None:
        """
        Make a new CA, cross-signed by the present one; every leaf is minted anew when asked for.

        Agents that trust either CA verify what is served from then on.
        """
        old = self._ca()
        certificate, key = self._new_ca()
        until = min(certificate.not_valid_after_utc, old.certificate.not_valid_after_utc)
        cross = (
            self._ca_builder(certificate.subject, key, path_length=0)
            .issuer_name(old.certificate.subject)
            .not_valid_after(until)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(old.key.public_key()), critical=False)
            .sign(old.key, hashes.SHA256())
        )
        self._keep(certificate, key, cross)
        self._minted.clear()
        log.info("ca_rotated", path=str(self.certificate_path))

    def leaves(self, plan: Plan) -> dict[str, Leaf]:
        """
        Return all leaves of a plan: `p<k>_s<shard>` and `addr-<address>`.

        Raises `CapacityExceeded` when the names of a policy do not fit into a certificate.
        """
        found: dict[str, Leaf] = {}
        for policy in plan.policies.values():
            names: list[set[str]] = [set() for _ in range(SHARDS)]
            for name in policy.sans:
                names[shard_of(name)].add(name)
            for shard, held in enumerate(names):
                found[f"p{policy.id}_s{shard}"] = self._leaf(f"p{policy.id}-{shard}", sorted(held) or [NOBODY])
            for address in _addresses(policy):
                found[f"addr-{address}"] = self._leaf(_address_file(address), [address])
        return found

    def sweep(self, plan: Plan) -> None:
        """Delete the files of leaves that the plan does not use."""
        used = {f"p{policy}-{shard}" for policy in plan.policies for shard in range(SHARDS)}
        used |= {_address_file(address) for policy in plan.policies.values() for address in _addresses(policy)}
        for path in self._directory.glob("*-cert.pem"):
            stem = path.name.removesuffix("-cert.pem")
            if stem != "ca" and stem not in used:
                path.unlink(missing_ok=True)
                path.with_name(f"{stem}-key.pem").unlink(missing_ok=True)
                self._minted.pop(stem, None)

    def next_renewal(self) -> dt.datetime:
        """Return when the first leaf in use is due."""
        ends = [minted.not_after for minted in tuple(self._minted.values())]  # a thread may be minting
        return min(ends, default=self._now() + LEAF_LIFE) - LEAF_RENEW

    # -- the CA ------------------------------------------------------------------------------

    def _ca(self) -> _Authority:
        if self._authority is None:
            raise Unavailable("the inspection CA is not open", code="CERT_REGEN")
        return self._authority

    def _broken(self, what: str) -> ClawkerError:
        return ClawkerError(
            f"{self.certificate_path} and {self._key_path.name} {what}",
            code="CERT_REGEN",
            hint="restore both from a backup, or remove both to make a new CA (running agents must be restarted)",
        )

    def _load(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        try:
            certificate = x509.load_pem_x509_certificate(self.certificate_path.read_bytes())
            key = serialization.load_pem_private_key(self._key_path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise self._broken(f"cannot be read: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise self._broken("hold a key that is not an elliptic curve key")
        if certificate.public_key() != key.public_key():
            raise self._broken("do not belong together")
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        except (x509.ExtensionNotFound, ValueError) as error:
            raise self._broken("are not a certificate authority") from error
        if not constraints.ca or not usage.key_cert_sign:
            raise self._broken("are not a certificate authority")
        if not certificate.not_valid_before_utc <= self._now() < certificate.not_valid_after_utc:
            raise self._broken("are not valid now")
        self._key_path.chmod(0o600)
        return certificate, key

    def _load_cross(self, certificate: x509.Certificate) -> x509.Certificate | None:
        """Return the cross-certificate if it speaks for this CA and its time is not over."""
        try:
            cross = x509.load_pem_x509_certificate(self._cross_path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("inspection_cross_unreadable", path=str(self._cross_path), cause=str(error))
            return None
        same = cross.public_key() == certificate.public_key() and cross.subject == certificate.subject
        return cross if same and cross.not_valid_after_utc > self._now() else None

    def _keep(
        self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, cross: x509.Certificate | None = None
    ) -> None:
        kept = {self._key_path.name: _key_pem(key), self.certificate_path.name: _pem(certificate)}
        if cross is not None:
            kept[self._cross_path.name] = _pem(cross)
        try:
            # All of it in one file first: a crash between the others is finished by the next `open`.
            write_durably(self._pending_path, orjson.dumps(kept), 0o600)
            self._finish_keeping()
        except OSError as error:
            raise ClawkerError(f"{self.certificate_path} could not be written: {error}", code="CERT_REGEN") from error
        self._authority = _Authority(certificate, key, cross)

    def _finish_keeping(self) -> None:
        """Put what `_keep` began into its files, if there is anything."""
        try:
            pending = orjson.loads(self._pending_path.read_bytes())
        except FileNotFoundError:
            return
        for name, pem in pending.items():
            write_durably(self._directory / name, pem.encode(), 0o600 if name == self._key_path.name else 0o644)
        self._pending_path.unlink()

    def _new_ca(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        # Two CAs never share a name, or clients could not tell which one signed.
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, CA_NAME),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, secrets.token_hex(8)),
            ]
        )
        certificate = (
            self._ca_builder(name, key, path_length=1)
            .issuer_name(name)
            .not_valid_after(self._now() + dt.timedelta(days=365 * CA_YEARS))
            .sign(key, hashes.SHA256())
        )
        return certificate, key

    def _ca_builder(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *, path_length: int
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now() - _BACKDATE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )

    # -- leaves ------------------------------------------------------------------------------

    def _leaf(self, stem: str, names: Iterable[str]) -> Leaf:
        wanted = tuple(names)
        known = self._minted.get(stem) or self._from_disk(stem)
        if known is None or known.names != wanted or known.not_after - self._now() < LEAF_RENEW:
            known = self._mint(stem, wanted)
        self._minted[stem] = known
        return known.leaf

    def _paths(self, stem: str) -> tuple[Path, Path]:
        return self._directory / f"{stem}-cert.pem", self._directory / f"{stem}-key.pem"

    def _from_disk(self, stem: str) -> _Minted | None:
        """Return a leaf of an earlier life if this CA signed it and the pair fits."""
        cert_path, key_path = self._paths(stem)
        with contextlib.suppress(OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            certificate = x509.load_pem_x509_certificate(cert_path.read_bytes())
            key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
            certificate.verify_directly_issued_by(self._ca().certificate)
            held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            if isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key():
                return self._minted_of(stem, tuple(str(name.value) for name in held), certificate, key)
        return None

    def _mint(self, stem: str, names: tuple[str, ...]) -> _Minted:
        authority = self._ca()
        key = ec.generate_private_key(ec.SECP256R1())
        until = min(self._now() + LEAF_LIFE, authority.certificate.not_valid_after_utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, LEAF_NAME)]))
            .issuer_name(authority.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now() - _BACKDATE)
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
            )
            .sign(authority.key, hashes.SHA256())
        )
        size = len(certificate.public_bytes(serialization.Encoding.DER))
        if size > MAX_LEAF_BYTES:
            raise CapacityExceeded(
                f"{len(names)} inspected names of one policy need a certificate of {size} bytes, "
                f"at most {MAX_LEAF_BYTES} are possible",
                limit="rules",
                hint="use wildcards, or tls: passthrough for names without path rules",
            )
        cert_path, key_path = self._paths(stem)
        try:
            write_durably(key_path, _key_pem(key).encode(), 0o600)
            write_durably(cert_path, _pem(certificate).encode(), 0o644)
        except OSError as error:
            raise ClawkerError(f"{cert_path} could not be written: {error}", code="CERT_REGEN") from error
        return self._minted_of(stem, names, certificate, key)

    def _minted_of(
        self, stem: str, names: tuple[str, ...], certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> _Minted:
        cross = self._ca().cross
        chain = _pem(certificate) + (_pem(cross) if cross is not None else "")
        mark = hashlib.sha256(chain.encode()).hexdigest()[:12]
        cert_path, key_path = self._paths(stem)
        leaf = Leaf(chain, _key_pem(key), mark, str(cert_path), str(key_path))
        return _Minted(names, certificate.not_valid_after_utc, leaf)


def _addresses(policy: Policy) -> list[str]:
    return sorted({origin.base for origin in policy.origins if origin.is_address and origin.tls})


def _address_file(address: str) -> str:
    return "addr-" + address.replace(".", "_").replace(":", "_")


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
