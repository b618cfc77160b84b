"""
Files that a server makes on its host: directories, the CA bundle of agents, the files that keep it alone.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from clawker_cp.config import Directories
from clawker_cp.errors import Conflict, Unavailable

RUN_DIRECTORY = Path("/run/clawker")
PID_FILE = "cp.pid"
CA_DIRECTORY = Path("/usr/local/share/clawker/ca")  # where sandboxes find the bundle


def make_directories(directories: Directories) -> None:
    """
    Make what the server writes into.
    """
    directories.firewall.mkdir(parents=True, exist_ok=True, mode=0o755)
    directories.state.mkdir(parents=True, exist_ok=True, mode=0o711)
    RUN_DIRECTORY.mkdir(parents=True, exist_ok=True, mode=0o755)


def write_bundle(directory: Path, roots: Path, own_pem: str) -> None:
    """
    System roots and our inspection CA, as sandboxes get them (contract 8.6).
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o755)
    CA_DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, text in (("ca.pem", own_pem), ("bundle.pem", roots.read_text() + own_pem)):
        temporary = directory / f".clawker-{name}.tmp"
        temporary.write_text(text)
        temporary.chmod(0o644)
        temporary.replace(directory / name)


def take_pid_file() -> Any:
    """
    Hold the pid file of this host for as long as the returned file is open. Raises `Conflict` if another server does.
    """
    path = RUN_DIRECTORY / PID_FILE
    file = _held(path)
    if file is None:
        raise Conflict(
            f"a control plane runs on this host already (see {path})",
            code="ALREADY_RUNNING",
            hint="`clawker-cp run` joins one that serves sandboxes; one that serves containers runs none (`engine`)",
        )
    return file


def server_runs(pid_file: Path = RUN_DIRECTORY / PID_FILE) -> bool:
    """
    Whether a server runs on this host itself, outside of a container: it holds the pid file, and the pins.
    """
    try:
        with pid_file.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """
    Do something that two programs must not do at once, while the file is held. Raises `Conflict` if another does it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _held(path)
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror}", hint="run it as who owns the directory") from error
    if file is None:
        raise Conflict(
            f"{what} is at work already, as process {path.read_text().strip() or 'unknown'}",
            code="ALREADY_RUNNING",
            hint="wait until it is over, and repeat this",
        )
    with file:
        yield


def _held(path: Path) -> IO[str] | None:
    """The file, locked and with our process's number in it; None when somebody else holds it."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
