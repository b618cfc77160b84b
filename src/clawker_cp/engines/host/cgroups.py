"""
The agents' parent cgroup and one child per sandbox, on cgroup2 wherever it is mounted.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from clawker_cp.errors import DeadlineExceeded, Unsupported


def find_cgroup2(mountinfo: Path = Path("/proc/self/mountinfo")) -> Path:
    """
    The mount point of cgroup2; hybrid hosts have it beside v1 controllers.
    """
    for line in mountinfo.read_text().splitlines():
        left, _separator, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            return Path(left.split()[4])
    raise Unsupported(
        "no cgroup2 is mounted",
        feature="cgroup2",
        needs="a cgroup2 mount",
        hint="mount it: mount -t cgroup2 none /sys/fs/cgroup",
    )


def ensure(path: Path) -> int:
    """
    Make a cgroup and return its id, the inode of its directory.
    """
    path.mkdir(exist_ok=True)
    return path.stat().st_ino


def is_populated(path: Path) -> bool:
    """
    Whether a process lives in the cgroup or below it.
    """
    try:
        return "populated 1" in (path / "cgroup.events").read_text()
    except FileNotFoundError:
        return False


async def kill(path: Path, limit_s: float) -> None:
    """
    Kill everything in a cgroup and wait until it is empty.
    """
    try:
        (path / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        return
    until = time.monotonic() + limit_s
    while is_populated(path):
        if time.monotonic() > until:
            raise DeadlineExceeded(f"processes in {path} did not end within {limit_s:.0f} s")
        await asyncio.sleep(0.01)


def remove(path: Path) -> None:
    """
    Remove a cgroup and what an agent may have made below it; it has to be empty of processes.
    """
    if not path.exists():
        return
    for child in sorted(path.iterdir()):
        if child.is_dir():
            remove(child)
    path.rmdir()
