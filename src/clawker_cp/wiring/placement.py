"""
Where this server runs: on the host, or as the container `clawker-controlplane`; what follows from it.

A decision over text that `look` reads from /proc; asks nobody, changes nothing. Used by the application
before anything is bound (contract 1.1, 1.3, 1.5, ruling R1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
# Docker and Podman put these three files of a container, by its id, over the image's.
_OWN_FILES = frozenset(("/etc/hostname", "/etc/hosts", "/etc/resolv.conf"))
_BY_FILE = re.compile(r"/(?:overlay-)?containers/([0-9a-f]{64})/")
_BY_CGROUP = re.compile(r"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?(?:$|/)", re.MULTILINE)
# Whoever starts us as the control plane's container mounts one of these (contract 1.5, 1.6).
_MOUNTED = ("/etc/clawker/config", "/etc/clawker/auth")
HOST_NETNS = Path("/proc/1/ns/net")


@dataclass(frozen=True, slots=True)
class Listeners:
    """The addresses each listener binds, and the one under which the server probes itself (contract 1.1)."""

    admin: tuple[str, ...]
    agents: tuple[str, ...]
    health: tuple[str, ...]
    metrics: tuple[str, ...]
    tokens: tuple[str, ...]
    token_admin: tuple[str, ...]
    oathkeeper_proxy: tuple[str, ...]
    probe_agents: str


@dataclass(frozen=True, slots=True)
class Placement:
    """
    Where we are. `container_id` is "" on a host, and in a container that nobody made for this server.

    `host_netns` is what to enter before the host's bridge, packet filter or sockets are touched: None when
    our own network namespace is the host's. `host_reachable` False: the container has no `pid: host`, so the
    host ring, bypass elements of it and the cutting of connections are not to be had.
    """

    container_id: str = ""
    host_netns: Path | None = None
    host_reachable: bool = True

    @property
    def in_container(self) -> bool:
        return bool(self.container_id)

    def listeners(self, cp: str) -> Listeners:
        """
        Who binds what, given the control plane's address on the agents' network (contract 1.3).

        In a container everything that is published, or that agents reach, is bound everywhere: who gets there
        is decided by what is published and by the kernel.
        """
        if self.in_container:
            everywhere = (EVERYWHERE,)
            return Listeners(
                admin=everywhere,
                agents=everywhere,
                health=everywhere,
                metrics=everywhere,
                tokens=everywhere,
                token_admin=(LOOPBACK,),
                oathkeeper_proxy=everywhere,
                probe_agents=LOOPBACK,
            )
        both = tuple(dict.fromkeys((LOOPBACK, cp)))
        return Listeners(
            admin=(LOOPBACK,),
            agents=(cp,),
            health=both,
            metrics=(LOOPBACK,),
            tokens=both,
            token_admin=(LOOPBACK,),
            oathkeeper_proxy=(LOOPBACK,),
            probe_agents=cp,
        )


def placement(own_cgroup: str, first_cgroup: str, mountinfo: str) -> Placement:
    """
    Decide from /proc/self/cgroup, /proc/1/cgroup and /proc/self/mountinfo.

    Process 1 in another cgroup than ours is the host's first process, so its namespaces are the host's.
    That we are in some container is not enough: without what is mounted for a control plane it is
    somebody's build or test container, where this server is set up as on a host.
    """
    mounts = list(_mounts(mountinfo))
    made_for_us = any(point == place or point.startswith(f"{place}/") for _, point in mounts for place in _MOUNTED)
    found = container_id(own_cgroup, mountinfo) if made_for_us else ""
    if not found:
        return Placement()
    reachable = bool(first_cgroup.strip()) and first_cgroup.strip() != own_cgroup.strip()
    return Placement(found, HOST_NETNS if reachable else None, reachable)


def container_id(own_cgroup: str, mountinfo: str) -> str:
    """
    The full id of the container that a process is in, "" for none or one that cannot be told.

    By the files that the engine mounted, which private cgroup namespaces do not hide; else by the cgroup.
    """
    for source, point in _mounts(mountinfo):
        match = _BY_FILE.search(source) if point in _OWN_FILES else None
        if match:
            return match[1]
    ids = set(_BY_CGROUP.findall(own_cgroup))
    return ids.pop() if len(ids) == 1 else ""


def look(proc: Path = Path("/proc")) -> Placement:
    """
    `placement` of this process.
    """
    return placement(*(_text(proc / name) for name in ("self/cgroup", "1/cgroup", "self/mountinfo")))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _mounts(mountinfo: str) -> list[tuple[str, str]]:
    """Root and mount point of every line."""
    lines = (line.split(" ") for line in mountinfo.splitlines())
    return [(fields[3], fields[4]) for fields in lines if len(fields) > 4]
