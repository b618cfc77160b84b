"""
Where a container's cgroup is: from its first process, or from its id and the engine's driver.

The process is the better witness: it works for every driver and layout (version 2, hybrid, rootless, a
slice of the owner's). What it says is believed only if the container's id is part of the path, so a
process id that was reused since the engine told it never leads to somebody else's cgroup.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clawker_cp.engines.host.cgroups import MountPoint, read_mounts
from clawker_cp.errors import NotFound, Unsupported

PROC = Path("/proc")
# How far a search by id goes down; slices nest a few levels, agents cannot make any above their own.
SEARCH_DEPTH = 8
_SLICE = ".slice"
_CONTAINER = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Place:
    """A container's cgroup: its directory below the cgroup2 mount, its id, its first process (0: not seen)."""

    path: Path
    id: int
    pid: int


def unified_path(text: str) -> str:
    """
    The cgroup2 path in the text of a `/proc/<pid>/cgroup`, "" when it has none.
    """
    return next((line[3:] for line in text.splitlines() if line.startswith("0::/")), "")


def within_mount(root: str, path: str) -> str | None:
    """
    A cgroup path as seen below a mount of cgroup2, relative, or None when the mount does not show it.

    `root` is the mount's root as mountinfo tells it, `path` that of `/proc/<pid>/cgroup`. The kernel writes
    both relative to the reader's cgroup namespace: what is outside begins with `/..`, one for each level.
    """
    top, parts = _split(root), _split(path)
    if parts[: len(top)] == top:
        rest = parts[len(top) :]
        # More `..` than the mount's root has: above it.
        return None if ".." in rest else "/".join(rest)
    return None


def container_part(path: str, container_id: str) -> str | None:
    """
    The part of a cgroup path that ends with the container's own directory, None when it is in none of its own.

    Drivers call it `<id>`, `docker-<id>.scope` or the like; below it may be cgroups that the container made.
    """
    parts = path.split("/")
    named = re.compile(rf"(?:[a-z-]+-)?{re.escape(container_id)}(?:\.scope)?")
    for at, part in enumerate(parts):
        if named.fullmatch(part):
            return "/".join(parts[: at + 1])
    return None


def slice_path(name: str) -> str:
    """
    Where systemd puts a slice: `a-b.slice` is below `a.slice`; "" is the root, `-.slice`.
    """
    stem = name.removesuffix(_SLICE)
    if not name.endswith(_SLICE) or "/" in name or (stem != "-" and "" in stem.split("-")):
        raise ValueError(f"{name!r} is not the name of a slice")
    if stem == "-":
        return ""
    words = stem.split("-")
    return "/".join("-".join(words[: at + 1]) + _SLICE for at in range(len(words)))


def expected_path(container_id: str, driver: str, parent: str = "", *, user: int | None = None) -> str:
    """
    Where an engine's driver puts a container, relative to the root of cgroup2.

    `driver` is `systemd` or `cgroupfs`; `parent` the container's or the daemon's cgroup parent, "" for the
    default; `user` the owner of a rootless daemon. Raises `ValueError` for a parent that the driver refuses.
    """
    if driver != "systemd":
        return f"{(parent or '/docker').strip('/')}/{container_id}".lstrip("/")
    base = f"user.slice/user-{user}.slice/user@{user}.service/" if user else ""
    inside = slice_path(parent or ("user.slice" if user else "system.slice"))
    return f"{base}{inside}{'/' if inside else ''}docker-{container_id}.scope"


def mounts_of_cgroup2(mounts: list[MountPoint]) -> list[MountPoint]:
    """
    Mounts of cgroup2, those that show the most first.
    """
    return sorted((mount for mount in mounts if mount.kind == "cgroup2"), key=lambda mount: len(_split(mount.root)))


def locate(container_id: str, pid: int, *, driver: str = "", parent: str = "", user: int | None = None) -> Place:
    """
    Find a running container's cgroup and make sure that it is the container's. Blocks for a few files.

    Raises `NotFound` when the container is gone, and `Unsupported` when this process cannot see its cgroup.
    """
    mounts = mounts_of_cgroup2(read_mounts())
    if not mounts:
        raise Unsupported(
            "no cgroup2 is mounted", feature="cgroup2", needs="a cgroup2 mount", hint="mount -t cgroup2 none DIR"
        )
    part = container_part(_of_process(pid), container_id) if pid else None
    if part is not None:
        for mount in mounts:
            inside = within_mount(mount.root, part)
            if inside is not None and (mount.path / inside).is_dir():
                return _verified(mount.path / inside, container_id, pid)
        raise Unsupported(
            f"the cgroup of container {container_id[:12]} is outside what this process sees",
            feature="cgroup2",
            needs="the host's cgroup namespace",
            hint="run the control plane with cgroupns host and /sys/fs/cgroup mounted",
        )
    # The engine's process ids are not ours (another process namespace), or the process just ended.
    for mount in mounts:
        for guess in _guesses(mount.path, container_id, driver, parent, user):
            with contextlib.suppress(FileNotFoundError):
                return Place(guess, guess.stat().st_ino, 0)
    raise NotFound(f"container {container_id[:12]} has no cgroup: it ended, or the engine does not use cgroup2")


def _verified(path: Path, container_id: str, pid: int) -> Place:
    """The place, if the process is in it (or below) still, seen from the cgroup and from the process."""
    try:
        number = path.stat().st_ino
        if pid in _processes(path) and container_part(_of_process(pid), container_id) is not None:
            return Place(path, number, pid)
    except OSError:
        pass
    raise NotFound(f"container {container_id[:12]} ended")


def _processes(path: Path) -> set[int]:
    found: set[int] = set()
    for directory, _children, _files in os.walk(path):
        with contextlib.suppress(OSError):
            found.update(int(line) for line in (Path(directory) / "cgroup.procs").read_text().split())
    return found


def _of_process(pid: int) -> str:
    try:
        return unified_path((PROC / str(pid) / "cgroup").read_text())
    except OSError:
        return ""


def _guesses(mount: Path, container_id: str, driver: str, parent: str, user: int | None) -> Iterator[Path]:
    if driver:
        with contextlib.suppress(ValueError):
            yield mount / expected_path(container_id, driver, parent, user=user)
    # The daemon's own cgroup parent is told nowhere.
    for directory, children, _files in os.walk(mount):
        if len(Path(directory).relative_to(mount).parts) >= SEARCH_DEPTH:
            children.clear()
        found = [child for child in children if container_part(child, container_id)]
        if found:
            yield Path(directory, found[0])
            return
        # What a container makes below its own cgroup may have any name.
        children[:] = [child for child in children if not _CONTAINER.search(child)]


def _split(path: str) -> list[str]:
    return [part for part in path.split("/") if part]
