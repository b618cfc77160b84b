"""
A file that only grows until it is rotated: 50 MB, three compressed backups, seven days.

Synchronous; callers use it from a thread of theirs. Owns the file and its backups
`<name>.1.gz` (newest) to `<name>.3.gz`; `<name>.1` exists while it is being compressed.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from clawker_cp.config import ROTATE_AGE_S, ROTATE_BACKUPS, ROTATE_BYTES

MODE = 0o640


class RotatingFile:
    """
    Appends whole lines. Every method may raise OSError and may be called again afterwards.

    A write that fails half-way is taken back, so that no reader sees half a line.
    """

    def __init__(
        self,
        path: Path,
        *,
        limit_bytes: int = ROTATE_BYTES,
        backups: int = ROTATE_BACKUPS,
        age_s: float = ROTATE_AGE_S,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._backups = backups
        self._age_s = age_s
        self._wall = wall
        self._file: BinaryIO | None = None
        self._size = 0

    @property
    def full(self) -> bool:
        """Whether it is time to rotate: large enough, and the last backup is compressed."""
        return self._size >= self._limit_bytes and not self._moved.exists()

    @property
    def uncompressed(self) -> bool:
        """Whether `compress` has something to do (also after a crash)."""
        return self._moved.exists()

    @property
    def _moved(self) -> Path:
        return self._path.with_name(f"{self._path.name}.1")

    def _backup(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}.gz")

    def write(self, lines: bytes) -> None:
        """
        Append lines that end in newlines.
        """
        file = self._open()
        try:
            view = memoryview(lines)
            while view:
                view = view[file.write(view) :]
        except OSError:
            os.ftruncate(file.fileno(), self._size)
            raise
        self._size += len(lines)

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            descriptor = os.open(
                self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, MODE
            )
            self._file = open(descriptor, "ab", buffering=0)  # noqa: PTH123, SIM115 - kept open
            self._size = os.fstat(descriptor).st_size
        return self._file

    def rotate(self) -> None:
        """
        Begin a new file; the old one waits for `compress`.
        """
        self.close()
        self._path.replace(self._moved)
        self._open()

    def compress(self) -> None:
        """
        Turn the file that was rotated into the newest backup; the oldest and the outdated ones go.
        """
        temporary = self._path.with_name(f".clawker-{self._path.name}.tmp")
        try:
            with self._moved.open("rb") as source, gzip.open(temporary, "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target, 1 << 18)
            temporary.chmod(MODE)
            for number in range(self._backups, 1, -1):
                if self._backup(number - 1).exists():
                    self._backup(number - 1).replace(self._backup(number))
            temporary.replace(self._backup(1))
            self._moved.unlink()
        finally:
            temporary.unlink(missing_ok=True)
        self.expire()

    def expire(self) -> None:
        """
        Remove backups older than the limit.
        """
        for number in range(1, self._backups + 1):
            backup = self._backup(number)
            if backup.exists() and self._wall() - backup.stat().st_mtime > self._age_s:
                backup.unlink()

    def newest_first(self) -> Iterator[BinaryIO]:
        """
        Open the file and its backups for reading, one after the other; what cannot be opened is skipped.
        """
        candidates: list[tuple[Path, Callable[[Path], BinaryIO]]] = [(self._path, _plain), (self._moved, _plain)]
        candidates += [(self._backup(number), _packed) for number in range(1, self._backups + 1)]
        for path, opener in candidates:
            try:
                file = opener(path)
            except OSError:
                continue
            with file:
                yield file

    def close(self) -> None:
        """
        Close the descriptor; the next write opens again.
        """
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _packed(path: Path) -> BinaryIO:
    return io.BufferedReader(gzip.open(path, "rb"))
