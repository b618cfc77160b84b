"""
The agents' parent cgroup and one child per sandbox, on cgroup2 wherever it is mounted.

Limits go to cgroup2 where it has the controllers, on hybrid hosts to the version 1 hierarchies,
below our own cgroup there. Knows nothing of BPF.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from clawker_cp.engines.base import Limits
from clawker_cp.errors import DeadlineExceeded, Unavailable, Unsupported

_ESCAPE = re.compile(r"\\([0-7]{3})")
_CONTROLLERS = ("memory", "cpu", "pids")
CPU_PERIOD_US = 100_000
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo, as far as it matters here."""

    root: str
    path: Path
    kind: str
    options: frozenset[str]


def read_mounts(mountinfo: Path = Path("/proc/self/mountinfo")) -> list[MountPoint]:
    """
    What is mounted in our namespace, octal escapes undone.
    """
    mounts = []
    for line in mountinfo.read_text().splitlines():
        left, _separator, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) >= 5:
            options = frozenset(rest[2].split(",")) if len(rest) > 2 else frozenset()
            mounts.append(MountPoint(_unescape(fields[3]), Path(_unescape(fields[4])), rest[0], options))
    return mounts


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def find_cgroup2(mountinfo: Path = Path("/proc/self/mountinfo")) -> Path:
    """
    The mount point of cgroup2; hybrid hosts have it beside v1 controllers, a whole one is preferred.
    """
    found = [mount for mount in read_mounts(mountinfo) if mount.kind == "cgroup2"]
    if not found:
        raise Unsupported(
            "no cgroup2 is mounted",
            feature="cgroup2",
            needs="a cgroup2 mount",
            hint="mount it: mount -t cgroup2 none /sys/fs/cgroup",
        )
    return min(found, key=lambda mount: (mount.root != "/", len(str(mount.path)))).path


def ensure(path: Path) -> int:
    """
    Make a cgroup and return its id, the inode of its directory.
    """
    try:
        path.mkdir(exist_ok=True)
        return path.stat().st_ino
    except OSError as error:
        raise Unavailable(f"cannot make the cgroup {path}: {error.strerror}") from error


def is_populated(path: Path) -> bool:
    """
    Whether a process lives in the cgroup or below it.
    """
    try:
        return "populated 1" in (path / "cgroup.events").read_text()
    except OSError:
        return False


def freeze(path: Path, *, on: bool) -> None:
    """
    Stop or continue every process of the cgroup.
    """
    try:
        (path / "cgroup.freeze").write_text("1" if on else "0")
    except OSError as error:
        raise Unavailable(f"cannot freeze {path}: {error.strerror}") from error


async def kill(path: Path, limit_s: float) -> None:
    """
    Kill everything in a cgroup and wait until it is empty.
    """
    with contextlib.suppress(FileNotFoundError, OSError):
        (path / "cgroup.kill").write_text("1")
    until = time.monotonic() + limit_s
    while is_populated(path):
        if time.monotonic() > until:
            raise DeadlineExceeded(f"processes in {path} did not end within {limit_s:.0f} s")
        await asyncio.sleep(POLL_S)


def remove(path: Path) -> None:
    """
    Remove a cgroup and what an agent may have made below it; it has to be empty of processes.
    """
    for directory, _children, _files in os.walk(path, topdown=False):
        with contextlib.suppress(FileNotFoundError):
            Path(directory).rmdir()


async def clear(path: Path, limit_s: float) -> None:
    """
    Remove a cgroup whose processes are dead, which may hold on to it for a moment longer.
    """
    until = time.monotonic() + limit_s
    while True:
        try:
            remove(path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise Unavailable(f"cannot remove the cgroup {path}: {error.strerror}") from error
            if time.monotonic() > until:
                raise DeadlineExceeded(f"the cgroup {path} stays busy") from error
            await asyncio.sleep(POLL_S)
        else:
            return


class Limiter:
    """
    Sets the limits of sandboxes below one parent cgroup, where this host has the controllers.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._places: dict[str, tuple[Path, int]] = {}

    def prepare(self) -> None:
        """
        Find out which limits are possible, and hand the controllers down.
        """
        mounts = read_mounts()
        for controller in _CONTROLLERS:
            if self._hand_down(controller):
                self._places[controller] = (self._parent, 2)
        for controller, directory in _version1(mounts).items():
            self._places.setdefault(controller, (directory / self._parent.name, 1))

    def apply(self, name: str, limits: Limits) -> tuple[str, ...]:
        """
        Set the limits of the child called `name`; returns those that could not be set.
        """
        unmet = []
        for controller, wanted in _wanted(limits):
            place = self._places.get(controller)
            try:
                if place is None:
                    raise FileNotFoundError(controller)
                directory, version = place[0] / name, place[1]
                directory.mkdir(parents=True, exist_ok=True)
                for file, value in _files(controller, version, wanted):
                    (directory / file).write_text(value)
            except OSError:
                unmet.append(controller)
        return tuple(unmet)

    def joined(self, name: str) -> list[Path]:
        """
        The version 1 directories that processes of a child have to join too.
        """
        paths = {base / name for base, version in self._places.values() if version == 1}
        return sorted(path for path in paths if path.is_dir())

    async def clear(self, name: str, limit_s: float) -> None:
        """
        Remove the version 1 directories of a child; its processes have to be dead.
        """
        for path in self.joined(name):
            await clear(path, limit_s)

    def remove_parents(self) -> None:
        """
        Remove the version 1 parents if nothing is left below them.
        """
        for base, version in self._places.values():
            if version == 1:
                with contextlib.suppress(OSError):
                    base.rmdir()

    def _hand_down(self, controller: str) -> bool:
        mount = self._parent.parent
        try:
            if controller not in (mount / "cgroup.controllers").read_text().split():
                return False
            for directory in (mount, self._parent):
                (directory / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            return False
        return True


def _version1(mounts: list[MountPoint]) -> dict[str, Path]:
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _number, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            own[name] = path
    found = {}
    for mount in mounts:
        if mount.kind != "cgroup":
            continue
        for name in set(_CONTROLLERS) & mount.options:
            inside = own.get(name, "/").removeprefix(mount.root.rstrip("/"))
            directory = mount.path / inside.lstrip("/")
            found[name] = directory if directory.is_dir() else mount.path
    return found


def _wanted(limits: Limits) -> list[tuple[str, int]]:
    pairs = (("memory", limits.memory_bytes), ("cpu", limits.cpu_percent), ("pids", limits.pids))
    return [(name, value) for name, value in pairs if value > 0]


def _files(controller: str, version: int, wanted: int) -> list[tuple[str, str]]:
    if controller == "memory":
        return [("memory.max" if version == 2 else "memory.limit_in_bytes", str(wanted))]
    if controller == "pids":
        return [("pids.max", str(wanted))]
    quota = wanted * CPU_PERIOD_US // 100
    if version == 2:
        return [("cpu.max", f"{quota} {CPU_PERIOD_US}")]
    return [("cpu.cfs_period_us", str(CPU_PERIOD_US)), ("cpu.cfs_quota_us", str(quota))]
