"""
Minting and judging certificates: ECDSA P-256, SHA-256, the profiles of the contract. No files.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from clawker_cp.pki.profiles import BACKDATE, ORGANISATION, Profile

PrivateKey = ec.EllipticCurvePrivateKey
E = TypeVar("E", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate with its private key; `chain` are the intermediates that go with it."""

    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)
    chain: tuple[x509.Certificate, ...] = ()

    @property
    def certificate_pem(self) -> bytes:
        """The certificate and its intermediates, leaf first."""
        return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (self.certificate, *self.chain))

    @property
    def key_pem(self) -> bytes:
        """The key as SEC1 PEM."""
        return key_pem(self.key)


def key_pem(key: PrivateKey) -> bytes:
    """
    A private key as PEM `EC PRIVATE KEY` (SEC1), unencrypted.
    """
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def new_key() -> PrivateKey:
    """
    A fresh P-256 key.
    """
    return ec.generate_private_key(ec.SECP256R1())


def mint(
    profile: Profile,
    issuer: Identity | None,
    now: dt.datetime,
    *,
    uris: Sequence[str] = (),
    key: PrivateKey | None = None,
) -> Identity:
    """
    Make a certificate of a profile; without an issuer it signs itself. A leaf below an intermediate carries it.

    It never outlives its issuer.
    """
    own = key or new_key()
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, profile.common_name),
        ]
    )
    end = now + profile.life
    if issuer is not None:
        end = min(end, issuer.certificate.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(own.public_key())
        .serial_number(secrets.randbits(127) | 1 << 126)
        .not_valid_before(now - BACKDATE)
        .not_valid_after(end)
        .add_extension(_key_usage(profile), critical=True)
    )
    if profile.is_authority:
        builder = builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=profile.path_length), critical=True
        ).add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
    else:
        builder = builder.add_extension(x509.ExtendedKeyUsage(_purposes(profile)), critical=False)
    names = _names(profile, uris)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if issuer is not None:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False
        )
    signer = issuer.key if issuer is not None else own
    certificate = builder.sign(signer, hashes.SHA256())
    intermediate = issuer is not None and issuer.certificate.issuer != issuer.certificate.subject
    chain = (issuer.certificate,) if issuer is not None and intermediate and not profile.is_authority else ()
    return Identity(certificate, own, chain)


def problems(
    certificate: x509.Certificate, profile: Profile, issuer: x509.Certificate | None, now: dt.datetime
) -> Iterator[str]:
    """
    Everything that is wrong with a certificate for its place: subject, issuer, time, extensions.

    `issuer` None = it has to have signed itself.
    """
    found = _common_name(certificate)
    if found != profile.common_name:
        yield f"is for {found!r}, not {profile.common_name!r}"
    if now < certificate.not_valid_before_utc:
        yield f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    if now >= certificate.not_valid_after_utc:
        yield f"ended on {certificate.not_valid_after_utc:%Y-%m-%d}"
    try:
        certificate.verify_directly_issued_by(issuer or certificate)
    except (ValueError, TypeError, InvalidSignature):
        yield f"was not issued by {_common_name(issuer) if issuer else 'itself'!r}"
    yield from _extension_problems(certificate, profile)


def is_due(certificate: x509.Certificate, profile: Profile, now: dt.datetime) -> bool:
    """
    Whether a certificate has so little time left that it is to be renewed.
    """
    return certificate.not_valid_after_utc - now < profile.renew_before


def thumbprint(certificate: x509.Certificate) -> str:
    """
    Hex SHA-256 of the certificate's DER.
    """
    return certificate.fingerprint(hashes.SHA256()).hex()


def load_identity(certificate_pem: bytes, key_pem_: bytes) -> Identity:
    """
    Read a pair. Raises `ValueError` saying which half is broken, or that they do not belong together.
    """
    try:
        certificates = x509.load_pem_x509_certificates(certificate_pem)
    except ValueError as error:
        raise ValueError("the certificate is not PEM") from error
    try:
        key = serialization.load_pem_private_key(key_pem_, password=None)
    except (ValueError, TypeError) as error:
        # The original may quote bytes of the key.
        raise ValueError("the key is not an unencrypted PEM key") from error.__cause__
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the key is not a P-256 key")
    if certificates[0].public_key() != key.public_key():
        raise ValueError("certificate and key do not belong together")
    return Identity(certificates[0], key, tuple(certificates[1:]))


def _extension_problems(certificate: x509.Certificate, profile: Profile) -> Iterator[str]:
    basic = _extension(certificate, x509.BasicConstraints)
    if profile.is_authority and (basic is None or not basic.ca):
        yield "is not a certificate authority"
    if not profile.is_authority and basic is not None and basic.ca:
        yield "is a certificate authority where a leaf belongs"
    usage = _extension(certificate, x509.KeyUsage)
    needed = "key_cert_sign" if profile.is_authority else "digital_signature"
    if usage is None or not getattr(usage, needed):
        yield f"lacks the key usage {needed}"
    purposes = set(_extension(certificate, x509.ExtendedKeyUsage) or ())
    for purpose in _purposes(profile):
        if purpose not in purposes:
            yield f"lacks the purpose {purpose._name}"
    names = _extension(certificate, x509.SubjectAlternativeName)
    dns = set(names.get_values_for_type(x509.DNSName)) if names else set()
    ips = {str(ip) for ip in names.get_values_for_type(x509.IPAddress)} if names else set()
    missing = sorted((set(profile.dns) - dns) | (set(profile.ips) - ips))
    if missing:
        yield f"lacks the names {', '.join(missing)}"


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _common_name(certificate: x509.Certificate) -> str:
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def _key_usage(profile: Profile) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not profile.is_authority,
        content_commitment=False,
        key_encipherment=profile.key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=profile.is_authority,
        crl_sign=profile.is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _purposes(profile: Profile) -> list[x509.ObjectIdentifier]:
    purposes = []
    if profile.client:
        purposes.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    if profile.server:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    return purposes


def _names(profile: Profile, uris: Sequence[str]) -> list[x509.GeneralName]:
    return [
        *(x509.DNSName(name) for name in profile.dns),
        *(x509.IPAddress(ipaddress.ip_address(address)) for address in profile.ips),
        *(x509.UniformResourceIdentifier(uri) for uri in uris),
    ]
