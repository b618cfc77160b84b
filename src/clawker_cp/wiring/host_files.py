"""
Files that a server makes on its host: directories, the CA bundle of agents, the pid file that keeps it alone.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from clawker_cp.config import Directories
from clawker_cp.errors import Conflict

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
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise Conflict(
            f"a control plane runs on this host already (see {path})",
            code="ALREADY_RUNNING",
            hint="`clawker-cp run` joins one that serves sandboxes; one that serves containers runs none (`engine`)",
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
