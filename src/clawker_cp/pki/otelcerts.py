"""
Telemetry client material on disk, one directory per service, swapped as a whole (contract 1.8).
"""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

from cryptography.exceptions import InvalidSignature

from clawker_cp.pki.certificates import is_due, load_identity
from clawker_cp.pki.infracerts import InfraCertificates
from clawker_cp.pki.profiles import infra_client
from clawker_cp.pki.tree import CA, PREPARED, AuthTree
from clawker_cp.runtime.durable import exchange, sync_directory, write_durably


def provision(directory: Path, service: str, tree: AuthTree, certificates: InfraCertificates, now: dt.datetime) -> bool:
    """
    Make `directory/<service>/{client.pem,client.key,ca.pem}` usable; returns whether it was written.

    What is there stays if it verifies against the present intermediate and is not due.
    """
    target = directory / service
    root = tree.path(CA.certificate).read_bytes()
    if _is_usable(target, service, root, certificates, now):
        return False
    fresh = directory / f"{PREPARED}{service}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    fresh.chmod(0o755)
    leaf = certificates.leaf(service, now)
    for name, data in (("client.key", leaf.key_pem), ("client.pem", leaf.certificate_pem), ("ca.pem", root)):
        write_durably(fresh / name, data, 0o644)
    if target.exists():
        exchange(fresh, target)
        shutil.rmtree(fresh, ignore_errors=True)
    else:
        fresh.rename(target)
        sync_directory(directory)
    return True


def _is_usable(target: Path, service: str, root: bytes, certificates: InfraCertificates, now: dt.datetime) -> bool:
    try:
        leaf = load_identity((target / "client.pem").read_bytes(), (target / "client.key").read_bytes())
        if (target / "ca.pem").read_bytes() != root:
            return False
    except (OSError, ValueError):
        return False
    issuer = certificates.leaf(service, now).chain
    try:
        leaf.certificate.verify_directly_issued_by(issuer[0])
    except (ValueError, TypeError, InvalidSignature):
        return False
    return leaf.chain == issuer and not is_due(leaf.certificate, infra_client(service), now)
