"""
The auth tree on disk (contract 1.6, 4.2): made once, verified before use, renewed, rotated.

Never makes a new root by itself: what does not fit together is an error that names the files, with
nothing written. A pair changes as one directory swap, so no reader sees a certificate with another's
key. Synchronous: callers on the loop go through a thread.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import orjson
import structlog
from cryptography import x509

from clawker_cp.errors import ClawkerError, InvalidInput
from clawker_cp.pki import profiles
from clawker_cp.pki.certificates import Identity, is_due, key_pem, load_identity, mint, new_key, problems
from clawker_cp.pki.profiles import Profile
from clawker_cp.runtime.durable import exchange, sync_directory, write_durably
from clawker_cp.runtime.jwk import public_jwk, read_jwks

log = structlog.get_logger()

MOUNTED = Path("/etc/clawker/auth")  # in the control plane's container; wins over the host's tree
MOUNTED_CA = "tls/ca.pem"
PREPARED = ".clawker-new-"
WARN_EVERY = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one pair lies, relative to the tree, and what it has to be."""

    directory: str
    stem: str
    profile: Profile
    optional: bool = False

    @property
    def certificate(self) -> str:
        return f"{self.directory}/{self.stem}.pem"

    @property
    def key(self) -> str:
        return f"{self.directory}/{self.stem}.key"


CA = Place("ca", "ca", profiles.CLI_CA)
SERVER = Place("tls", "server", profiles.SERVER)
CLI_CLIENT = Place("cli", "client", profiles.CLI_CLIENT)
CP_CLIENT = Place("cp", "client", profiles.CP_CLIENT)
OTEL_SERVER = Place("otel", "server", profiles.OTEL_SERVER)
INFRA_CA = Place("infra-ca", "infra-ca", profiles.INFRA_CA)
AGENTS_CA = Place("agents-ca", "agents-ca", profiles.AGENTS_CA, optional=True)
ISSUED = (SERVER, CLI_CLIENT, CP_CLIENT, OTEL_SERVER, INFRA_CA, AGENTS_CA)
SIGNING_KEY, SIGNING_JWK = "cli/signing.key", "cli/signing-jwk.json"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `auth status`."""

    path: Path
    subject: str
    not_after: dt.datetime | None
    problem: str = ""
    fix: str = ""


class AuthTree:
    """
    The tree at `root`. It can be written where `ca/ca.key` is; elsewhere it is only verified.

    `overrides` gives single files, by their place in the tree, another path (flags win over the tree).
    """

    def __init__(
        self,
        root: Path,
        *,
        overrides: Mapping[str, Path] = MappingProxyType({}),
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.root = root
        self._overrides = {relative: path for relative, path in overrides.items() if path}
        self._now = now
        self._told: dict[Place, dt.datetime] = {}

    @property
    def is_ours(self) -> bool:
        """Whether the tree may be written: not what is mounted, nor files that were named one by one."""
        return self.root != MOUNTED and not self._overrides

    def path(self, relative: str) -> Path:
        """The full path of a file of the tree."""
        return self._overrides.get(relative, self.root / relative)

    @property
    def holds_ca_key(self) -> bool:
        """Whether new certificates can be made here."""
        return self.path(CA.key).exists()

    def ensure(self) -> None:
        """
        Make what is missing and verify what is there; a tree that is not there at all is made whole.

        Raises `ClawkerError` (`PKI_INCONSISTENT`) with every problem; then nothing was written.
        """
        if self._is_empty():
            self._create()
            return
        faulty = [finding for finding in self.findings(ended=not self.holds_ca_key) if finding.problem]
        missing = [place for place in ISSUED if not place.optional and not self._exists(place)]
        if not self._exists(CA):
            faulty.append(self._rootless())
        if missing and not self.holds_ca_key:
            faulty += [
                Finding(self.path(p.certificate), p.profile.common_name, None, "is missing and cannot be made here",
                        "create it where ca.key is kept, with `clawkerctl auth init`")
                for p in missing
            ]  # fmt: skip
        if faulty:
            raise inconsistent(faulty)
        self._sweep()
        self._tighten()
        if missing:
            ca = self.identity(CA)
            for place in missing:
                self._replace(place, mint(place.profile, ca, self._now()))
        if not self.path(SIGNING_KEY).exists() and self.holds_ca_key:
            self._write_signing_key(self.path("cli"))
        self.renew()

    def verify(self) -> None:
        """
        Verify what a server needs, writing nothing (a tree that is mounted read-only).

        Raises `ClawkerError` (`PKI_INCONSISTENT`) with every problem.
        """
        faulty = [finding for finding in self.findings() if finding.problem]
        for needed in (CA.certificate, SERVER.certificate, SERVER.key, SIGNING_JWK):
            if not self.path(needed).exists():
                faulty.append(Finding(self.path(needed), "", None, "is missing", "run `clawkerctl auth init`"))
        if faulty:
            raise inconsistent(faulty)

    def findings(self, *, ended: bool = True) -> list[Finding]:
        """
        What is there, and what is wrong with it; missing files are not listed.

        `ended` False: that a leaf's time is over is no problem, since it can be renewed.
        """
        found, ca = self._look(CA, None, ended=True)
        for place in ISSUED:
            found += self._look(place, ca, ended=ended)[0]
        found += self._look_at_signing_key()
        return found

    def renew(self) -> list[Place]:
        """
        Replace leaves that are due; returns which. Without the CA's key they are only told of (`pki_expiring`).
        """
        renewed = []
        for place in ISSUED:
            if not self._exists(place):
                continue
            identity = self.identity(place)
            if not is_due(identity.certificate, place.profile, self._now()):
                continue
            if not self.holds_ca_key or not self.is_ours:
                self._warn(place, identity.certificate.not_valid_after_utc)
                continue
            self._replace(place, mint(place.profile, self.identity(CA), self._now()))
            log.info("pki_renewed", path=str(self.path(place.certificate)))
            renewed.append(place)
        return renewed

    def _warn(self, place: Place, end: dt.datetime) -> None:
        """Tell of a leaf that ends and cannot be renewed here, once a day."""
        told = self._told.get(place)
        if told is None or self._now() - told >= WARN_EVERY:
            self._told[place] = self._now()
            log.warning("pki_expiring", path=str(self.path(place.certificate)), days=(end - self._now()).days)

    def next_renewal(self) -> dt.datetime:
        """
        When the first leaf is due.
        """
        ends = [
            self.identity(place).certificate.not_valid_after_utc - place.profile.renew_before
            for place in ISSUED
            if self._exists(place)
        ]
        return min(ends, default=self._now() + profiles.YEAR)

    def rotate(self, *, force: bool = False) -> None:
        """
        Mint every leaf anew under the same CA; with `force` a whole new tree, which nothing old trusts.
        """
        if force:
            fresh = self._prepare()
            if self.root.exists():
                exchange(fresh, self.root)
                shutil.rmtree(fresh, ignore_errors=True)
            else:
                fresh.rename(self.root)
            return
        if not self.holds_ca_key:
            raise ClawkerError(
                f"{self.path(CA.key)} is not here, leaves cannot be made", code="PKI_INCONSISTENT",
                hint="rotate where the CA's key is kept",
            )  # fmt: skip
        ca = self.identity(CA)
        for place in ISSUED:
            if self._exists(place):
                self._replace(place, mint(place.profile, ca, self._now()))

    def identity(self, place: Place) -> Identity:
        """
        Read one pair. Raises `ClawkerError` (`PKI_INCONSISTENT`).
        """
        try:
            return load_identity(self.path(place.certificate).read_bytes(), self.path(place.key).read_bytes())
        except (OSError, ValueError) as error:
            raise inconsistent([self._faulty(place, _reason(error))]) from error

    def enable_agents_ca(self) -> Identity:
        """
        Return the intermediate that signs leaves of sandboxes, made on first use.
        """
        if not self._exists(AGENTS_CA):
            self._replace(AGENTS_CA, mint(AGENTS_CA.profile, self.identity(CA), self._now()))
        return self.identity(AGENTS_CA)

    # -- looking -----------------------------------------------------------------------------

    def _is_empty(self) -> bool:
        return (
            not any(self.path(name).exists() for place in (CA, *ISSUED) for name in (place.certificate, place.key))
            and not self.path(SIGNING_KEY).exists()
        )

    def _exists(self, place: Place) -> bool:
        return self.path(place.certificate).exists()

    def _look(
        self, place: Place, issuer: x509.Certificate | None, *, ended: bool
    ) -> tuple[list[Finding], x509.Certificate | None]:
        certificate_path, key_path = self.path(place.certificate), self.path(place.key)
        if not certificate_path.exists() and not key_path.exists():
            return [], None
        try:
            if certificate_path.exists() and not key_path.exists() and self._key_lives_elsewhere(place):
                certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
            else:
                certificate = load_identity(certificate_path.read_bytes(), key_path.read_bytes()).certificate
        except (OSError, ValueError) as error:
            return [self._faulty(place, _reason(error))], None
        at = self._now() if ended else min(self._now(), certificate.not_valid_after_utc - dt.timedelta(seconds=1))
        said = list(problems(certificate, place.profile, None if place is CA else issuer or certificate, at))
        if place is not CA and issuer is None:
            said = ["cannot be verified: the CA's certificate is not usable"]
        mode = stat.S_IMODE(key_path.stat().st_mode) if key_path.exists() else 0
        if mode & 0o077 & ~place.profile.key_mode and not self.holds_ca_key:
            said.append(f"has a key of mode {mode:04o}")
        subject = place.profile.common_name
        finding = Finding(
            certificate_path, subject, certificate.not_valid_after_utc, "; ".join(said), _fix(place) if said else ""
        )
        return [finding], certificate

    def _key_lives_elsewhere(self, place: Place) -> bool:
        """The CA's key, and the CLI's, are never mounted into a container."""
        return place in (CA, CLI_CLIENT, OTEL_SERVER) and not self.is_ours

    def _look_at_signing_key(self) -> list[Finding]:
        path = self.path(SIGNING_JWK)
        if not path.exists():
            return []
        try:
            read_jwks(path.read_bytes())
        except (OSError, InvalidInput) as error:
            fix = f"remove it and {SIGNING_KEY}, then `clawkerctl auth init`"
            return [Finding(path, "clawker-cli", None, _reason(error), fix)]
        return [Finding(path, "clawker-cli", None)]

    def _faulty(self, place: Place, problem: str) -> Finding:
        return Finding(self.path(place.certificate), place.profile.common_name, None, problem, _fix(place))

    def _rootless(self) -> Finding:
        return Finding(
            self.path(CA.certificate), CA.profile.common_name, None,
            "is missing while certificates that it issued are there",
            "restore ca/ from a backup, or `clawkerctl auth rotate --force` for a new one (agents must be restarted)",
        )  # fmt: skip

    # -- writing -----------------------------------------------------------------------------

    def _create(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._prepare()
        if self.root.exists():
            exchange(fresh, self.root)
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.rename(self.root)
            sync_directory(self.root.parent)
        log.info("pki_created", path=str(self.root))

    def _prepare(self) -> Path:
        """Write a whole new tree beside the old one, and verify it there."""
        fresh = self.root.with_name(f"{PREPARED}{self.root.name}")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700, parents=True)
        ca = mint(CA.profile, None, self._now())
        _write_pair(fresh / CA.directory, CA, ca)
        for place in ISSUED:
            if not place.optional:
                _write_pair(fresh / place.directory, place, mint(place.profile, ca, self._now()))
        AuthTree(fresh, now=self._now)._write_signing_key(fresh / "cli")
        faulty = [finding for finding in AuthTree(fresh, now=self._now).findings() if finding.problem]
        if faulty:
            raise inconsistent(faulty)
        return fresh

    def _replace(self, place: Place, identity: Identity) -> None:
        """Swap the directory of a pair; whatever else lies in it goes along."""
        directory = self.path(place.directory)
        fresh = directory.with_name(f"{PREPARED}{place.directory}")
        shutil.rmtree(fresh, ignore_errors=True)
        if directory.exists():
            shutil.copytree(directory, fresh)
            fresh.chmod(0o700)
        _write_pair(fresh, place, identity)
        if directory.exists():
            exchange(fresh, directory)
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.rename(directory)
            sync_directory(directory.parent)

    def _write_signing_key(self, directory: Path) -> None:
        key = new_key()
        jwk = orjson.dumps(public_jwk(key.public_key()))
        write_durably(directory / Path(SIGNING_JWK).name, jwk, 0o644)
        write_durably(directory / Path(SIGNING_KEY).name, key_pem(key), 0o600)

    def _tighten(self) -> None:
        """Set directories to 0700 and private keys to their mode again."""
        for directory in (self.root, *(self.path(place.directory) for place in (CA, *ISSUED))):
            if directory.exists():
                directory.chmod(0o700)
        for place in (CA, *ISSUED):
            if self.path(place.key).exists():
                self.path(place.key).chmod(place.profile.key_mode)
        if self.path(SIGNING_KEY).exists():
            self.path(SIGNING_KEY).chmod(0o600)

    def _sweep(self) -> None:
        """Remove what a killed writer left behind."""
        for left in self.root.glob(f"{PREPARED}*"):
            shutil.rmtree(left, ignore_errors=True)
        shutil.rmtree(self.root.with_name(f"{PREPARED}{self.root.name}"), ignore_errors=True)


def find_tree(data_dir: Path, overrides: Mapping[str, Path] = MappingProxyType({})) -> AuthTree:
    """
    The tree a server uses: flags, then what is mounted into its container, else the host's.

    In the container the CA's certificate lies beside the server's (contract 1.6).
    """
    if not MOUNTED.is_dir():
        return AuthTree(data_dir / "auth", overrides=overrides)
    moved = {CA.certificate: MOUNTED / MOUNTED_CA} if (MOUNTED / MOUNTED_CA).exists() else {}
    return AuthTree(MOUNTED, overrides={**moved, **overrides})


def inconsistent(faulty: list[Finding]) -> ClawkerError:
    """
    The error of a tree that does not fit together, naming every file.
    """
    log.error("pki_inconsistent", files=[str(one.path) for one in faulty])
    return ClawkerError(
        "; ".join(f"{one.path} {one.problem}" for one in faulty),
        code="PKI_INCONSISTENT",
        hint="; ".join(dict.fromkeys(one.fix for one in faulty if one.fix)),
    )


def _write_pair(directory: Path, place: Place, identity: Identity) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(directory / f"{place.stem}.key", identity.key_pem, place.profile.key_mode)
    write_durably(directory / f"{place.stem}.pem", identity.certificate_pem, 0o644)


def _fix(place: Place) -> str:
    if place is CA:
        return "restore ca/ from a backup, or `clawkerctl auth rotate --force` for a new one (agents must be restarted)"
    return f"`clawkerctl auth rotate` makes {place.directory}/ anew under the same CA"


def _reason(error: Exception) -> str:
    return f"cannot be read: {os.strerror(error.errno)}" if isinstance(error, OSError) and error.errno else str(error)


def paths(tree: AuthTree) -> Iterator[Path]:
    """
    Every file a tree may have.
    """
    for place in (CA, *ISSUED):
        yield from (tree.path(place.certificate), tree.path(place.key))
    yield from (tree.path(SIGNING_KEY), tree.path(SIGNING_JWK))
