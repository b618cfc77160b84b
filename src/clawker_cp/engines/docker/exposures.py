"""
Ways out of a container that its owner gave it (ruling R34, threats.md row 34), from the engine's record.

Plain functions. What is found cannot be stopped from outside, so it is shown, never silent. What leads
out is judged by what an agent that is root in its container could do with it:

- Capabilities count when they reach beyond the container or undo one of our layers: SYS_ADMIN (mounts,
  namespaces), BPF and PERFMON (kernel memory, other programs), SYS_MODULE, SYS_RAWIO, SYS_BOOT (another
  kernel), DAC_READ_SEARCH (files of the host by handle), NET_ADMIN (rewrites its packets behind the packet
  backstop, so that only the host ring is left), MAC_ADMIN and MAC_OVERRIDE (its own confinement), and
  SYS_PTRACE where it sees processes that are not its own. The engine's default set, NET_RAW
  included, does not count: the layers are built for it.
- A socket or bpffs leads out through a read-only mount as well: connecting and opening a map are no
  writes to the mount. Our own directories hold keys, so showing them whole counts too.
- The working directory never counts, except where it shows what is ours (ruling R27).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clawker_cp.engines.docker.containers import LABEL, labels_of, networks_of, section, text

CAPABILITIES = frozenset(
    ("ALL", "SYS_ADMIN", "BPF", "PERFMON", "SYS_MODULE", "SYS_RAWIO", "SYS_BOOT", "DAC_READ_SEARCH", "NET_ADMIN",
     "MAC_ADMIN", "MAC_OVERRIDE")
)  # fmt: skip
ENGINE_SOCKETS = (
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/podman/podman.sock",
    "/run/crio/crio.sock",
)
SYSTEM_PATHS = ("/etc", "/usr", "/root", "/proc", "/sys", "/dev", "/run")
# Devices that every container has or that reach nothing: they hold neither host files nor a network.
HARMLESS_DEVICES = frozenset(
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "fuse", "kvm", "kfd")
)
HARMLESS_BELOW = ("/dev/dri", "/dev/nvidia")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """
    What of this host leads out: paths as the host has them.

    `network` is the agents' network's id, `data_root` the engine's, `sockets` further engine sockets, `own` our
    directories, `cgroupfs` and `bpffs` where those are mounted.
    """

    network: str
    data_root: str = "/var/lib/docker"
    sockets: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    cgroupfs: tuple[str, ...] = ("/sys/fs/cgroup",)
    bpffs: tuple[str, ...] = ("/sys/fs/bpf",)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another container, as far as its network namespace goes; `network_mode` is the engine's word."""

    id: str
    name: str
    network_mode: str
    is_agent: bool


@dataclass(frozen=True, slots=True)
class _Bind:
    source: str
    writable: bool
    workdir: bool


def exposures(
    record: Mapping[str, Any],
    around: Surroundings,
    *,
    neighbours: Iterable[Neighbour] = (),
    volumes: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """
    Every way out of one container, sorted, each once.

    `neighbours` are the other containers; `volumes` maps names of volumes to the host path that their driver
    binds, for those whose driver does.
    """
    found = [
        *_privileges(section(record, "HostConfig")),
        *_devices(section(record, "HostConfig")),
        *_networks(record, around, list(neighbours)),
    ]
    for bind in _binds(record, volumes or {}):
        found += _paths(bind, around)
    return tuple(sorted(set(found)))


def _privileges(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("Privileged") is True:
        yield "privileged"
    if config.get("NetworkMode") == "host":
        yield "host_network"
    mode = text(config.get("PidMode"))
    if mode == "host":
        yield "host_pid"
    for name in _words(config.get("CapAdd")):
        short = name.upper().removeprefix("CAP_")
        if short in CAPABILITIES or (short == "SYS_PTRACE" and mode):
            yield f"capability:{short}"
    # `systempaths=unconfined`: /proc/sys and the like can be written.
    if config.get("ReadonlyPaths") == [] and config.get("Privileged") is not True:
        yield "mount:/proc"


def _devices(config: Mapping[str, Any]) -> Iterator[str]:
    devices = config.get("Devices")
    for device in devices if isinstance(devices, list) else ():
        path = normal(text(device.get("PathOnHost"))) if isinstance(device, Mapping) else ""
        if path and path not in HARMLESS_DEVICES and not path.startswith(HARMLESS_BELOW):
            yield f"device:{path}"
    # With MKNOD, which is in the default set, a rule is as good as the device.
    for rule in _words(config.get("DeviceCgroupRules")):
        yield f"device:{rule}"


def _networks(record: Mapping[str, Any], around: Surroundings, neighbours: list[Neighbour]) -> Iterator[str]:
    mode = text(section(record, "HostConfig").get("NetworkMode"))
    own = text(record.get("Id"))
    if mode.startswith("container:"):
        target = mode.removeprefix("container:")
        known = next((n for n in neighbours if target in {n.id, n.name}), None)
        if known is None or not known.is_agent:
            yield f"shared_network:{known.name if known else target[:12]}"
    names = {f"container:{own}", f"container:{text(record.get('Name')).removeprefix('/')}"}
    for neighbour in neighbours:
        if neighbour.id != own and neighbour.network_mode in names and not neighbour.is_agent:
            yield f"shared_network:{neighbour.name}"
    for name, number in networks_of(record):
        if number != around.network and name not in {"none", "host"}:
            yield f"second_network:{name}"


def _binds(record: Mapping[str, Any], volumes: Mapping[str, str]) -> Iterator[_Bind]:
    workdir = labels_of(section(record, "Config").get("Labels")).get(f"{LABEL}workdir", "")
    mounts = record.get("Mounts")
    for mount in mounts if isinstance(mounts, list) else ():
        if not isinstance(mount, Mapping):
            continue
        source = text(mount.get("Source"))
        if mount.get("Type") == "volume":
            # A volume is the engine's own storage, unless its driver binds a path of the host.
            source = volumes.get(text(mount.get("Name")), "")
        elif mount.get("Type") != "bind":
            continue
        if source:
            path = normal(source)
            yield _Bind(path, mount.get("RW") is not False, bool(workdir) and path == normal(workdir))


def _paths(bind: _Bind, around: Surroundings) -> Iterator[str]:
    path = bind.source
    if any(_shows(path, normal(engine)) for engine in (*ENGINE_SOCKETS, *around.sockets)):
        yield "engine_socket"
    if bind.writable and any(_touches(path, normal(mount)) for mount in around.cgroupfs):
        yield "cgroupfs"
    if any(_touches(path, normal(mount)) for mount in around.bpffs):
        yield "bpffs"
    own = [normal(directory) for directory in around.own]
    system = [] if bind.workdir else [*SYSTEM_PATHS, normal(around.data_root)]
    written = bind.writable and any(_touches(path, wanted) for wanted in (*own, *system))
    if written or any(_shows(path, directory) for directory in own):
        yield f"mount:{path}"


def normal(path: str) -> str:
    """
    A path without dots and double slashes, and with the one name that matters for two: /var/run is /run.
    """
    clean = posixpath.normpath("/" + path.lstrip("/"))
    if clean == "/var/run" or clean.startswith("/var/run/"):
        return clean.removeprefix("/var")
    return clean


def _shows(path: str, wanted: str) -> bool:
    """Whether mounting `path` shows `wanted`: it is that, or above it."""
    return path in {wanted, "/"} or wanted.startswith(f"{path}/")


def _touches(path: str, wanted: str) -> bool:
    """Whether mounting `path` shows `wanted` or a part of it."""
    return _shows(path, wanted) or path.startswith(f"{wanted}/")


def _words(raw: Any) -> list[str]:
    return [word for word in raw if isinstance(word, str)] if isinstance(raw, list) else []
