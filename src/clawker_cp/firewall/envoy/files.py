"""
Configuration files on their way to Envoy: written by rename, each with a version of its own.

Knows what it wrote last, so that only what differs is written again. Nothing is fsynced: all of
it is made anew at every start (R20). Synchronous and quick; called on the loop.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import structlog

from clawker_cp.errors import Unavailable
from clawker_cp.firewall.envoy.resources import CDS, LDS, ConfigFile

log = structlog.get_logger()

LOG_LIMIT_BYTES = 50 << 20
# Each file before those that name what is in it.
_RANK = {CDS: 0, LDS: 3}
_SECRETS, _ROUTES = 1, 2


def writing_order(names: Iterable[str]) -> list[str]:
    """Return file names in the order that keeps every reference valid: CDS, SDS, RDS, LDS."""

    def rank(name: str) -> tuple[int, str]:
        return (_RANK.get(name, _SECRETS if name.startswith("sds-") else _ROUTES), name)

    return sorted(names, key=rank)


class ConfigDirectory:
    """The files of one Envoy. `first_version` must be above every version it has ever seen."""

    def __init__(self, directory: Path, first_version: int) -> None:
        self._directory = directory
        self._version = first_version
        self._written: dict[str, ConfigFile] = {}
        self._versions: dict[str, int] = {}

    @property
    def written(self) -> Mapping[str, ConfigFile]:
        """What each file says now."""
        return self._written

    def changed(self, files: Mapping[str, ConfigFile]) -> list[str]:
        """Return the names of files that differ from what was written, in writing order."""
        known = self._written
        return writing_order(n for n, file in files.items() if n not in known or known[n].digest != file.digest)

    def write(self, name: str, file: ConfigFile) -> None:
        """Replace one file; raises `Unavailable`, the old one is whole then."""
        self._version += 1
        replace_file(self._directory / name, file.document(self._version), 0o600 if file.secret else 0o640)
        self._written[name] = file
        self._versions[name] = self._version

    def expected(self, names: Iterable[str]) -> dict[str, str]:
        """Return the statistics that acknowledge files, and the values they must have."""
        return {f"{self._written[name].stat}.version_text": str(self._versions[name]) for name in names}

    def forget(self, keep: Iterable[str]) -> None:
        """Delete files that nothing reads any more."""
        for name in set(self._written) - set(keep):
            (self._directory / name).unlink(missing_ok=True)
            del self._written[name], self._versions[name]


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """Replace a file by rename, with its mode from the first moment; raises `Unavailable`, nothing changed then."""
    temporary = path.with_name(f".clawker-{path.name}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _unwritten(path, error) from error


def make_directory(path: Path) -> None:
    """Make the directory that configuration is written to, if it is not there; raises `Unavailable`."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"{path} could not be written: {error.strerror}", code="CONFIG_REGEN", hint="is the disk full or read-only?"
    )


def trim_log(path: Path, limit_bytes: int = LOG_LIMIT_BYTES) -> bool:
    """
    Put a log that has grown too large aside as `.1` and empty it; returns whether it was.

    Its writer has it open for appending, and goes on at the new beginning.
    """
    try:
        if path.stat().st_size < limit_bytes:
            return False
        shutil.copyfile(path, path.with_name(f"{path.name}.1"))
        os.truncate(path, 0)
    except OSError as failure:
        log.warning("envoy_log_not_trimmed", cause=str(failure))
        return False
    return True
