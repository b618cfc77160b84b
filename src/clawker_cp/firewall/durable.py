"""
Files that must survive a crash whole: written beside, synced, renamed (contract 1.8), and locks.

Used by the rule store and the allocations. Synchronous: callers on the loop go through a thread.
"""

from __future__ import annotations

import contextlib
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
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
