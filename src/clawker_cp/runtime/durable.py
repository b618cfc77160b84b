"""
Files that must survive a crash whole: written beside, synced, renamed (contract 1.8), and locks.

Used by the rule store, the allocations and the certificates. Synchronous: callers on the loop go through a
thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from clawker_cp.errors import DeadlineExceeded

TEMPORARY_PREFIX = ".clawker-"
TEMPORARY_SUFFIX = ".tmp"
LOCK_POLL_S = 0.1


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """
    Replace a file so that no reader sees half of it and no crash loses it.

    Raises `OSError`; then the old file is untouched and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=TEMPORARY_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk: say where
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # renameat2(2), Linux 3.15


def exchange(first: Path, second: Path) -> None:
    """
    Swap two existing paths on one file system in one step: a reader sees all old or all new.

    Raises `OSError`; then both are where they were.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(first), None, str(second))
    sync_directory(first.parent)


@contextlib.contextmanager
def locked(path: Path, deadline: float) -> Iterator[None]:
    """
    Hold `flock` on a lock file, asking every 100 ms until `deadline` (monotonic seconds).

    Raises `DeadlineExceeded` when somebody else keeps it, `OSError` when it cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(f"another process holds the lock {path}") from error
                time.sleep(min(LOCK_POLL_S, left))
        yield
    finally:
        os.close(descriptor)
