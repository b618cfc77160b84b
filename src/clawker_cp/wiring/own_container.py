"""
The container `clawker-controlplane`: what it is made of, and whether one that exists is it (contract 1.1, 1.2, 1.6).

Plain functions from settings, directories and the engine's records to what the engine is asked for; nothing here
asks or changes anything. `container_life.py` acts on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import orjson

from clawker_cp.config import OVERRIDE_PREFIX, Directories, Settings
from clawker_cp.errors import Conflict
from clawker_cp.pki.tree import AGENTS_CA, CA, CP_CLIENT, INFRA_CA, SERVER, SIGNING_JWK, AuthTree

NAME = "clawker-controlplane"
NETWORK = "clawker-net"
IMAGE = "clawker-cp"
MANAGED, PURPOSE = "dev.clawker.managed", "dev.clawker.purpose"
BINARY, BPFFS, SPEC = "dev.clawker.cp.binary_sha256", "dev.clawker.cp.bpffs_source", "dev.clawker.cp.spec"
LOOPBACK = "127.0.0.1"
# BPF, SYS_ADMIN and NET_ADMIN load and attach programs, enter network namespaces and write packet filters. The
# kernel lets us open another process's namespaces (the host's, an agent's) only with SYS_PTRACE; the gate binds
# port 53; the files of an operator who is not root are read and written with DAC_OVERRIDE. Nothing else.
CAPABILITIES = ("BPF", "DAC_OVERRIDE", "NET_ADMIN", "NET_BIND_SERVICE", "SYS_ADMIN", "SYS_PTRACE")
CONFIG, DATA, LOGS, AUTH = "/etc/clawker/config", "/usr/local/share/clawker", "/var/log/clawker", "/etc/clawker/auth"
DOCKER_SOCKET = "/var/run/docker.sock"
CGROUPS, BPF_FS = "/sys/fs/cgroup", "/sys/fs/bpf"
STOP_S = 40  # the drain's own 25 s, children, and some air
# The files of the auth tree that are mounted, and where; keys of the CA and of the CLI are not among them.
MATERIAL = {
    CA.certificate: "tls/ca.pem",
    SIGNING_JWK: SIGNING_JWK,
    SERVER.certificate: SERVER.certificate,
    SERVER.key: SERVER.key,
    CP_CLIENT.certificate: CP_CLIENT.certificate,
    CP_CLIENT.key: CP_CLIENT.key,
    INFRA_CA.certificate: INFRA_CA.certificate,
    INFRA_CA.key: INFRA_CA.key,
    AGENTS_CA.certificate: AGENTS_CA.certificate,
    AGENTS_CA.key: AGENTS_CA.key,
}
_PASSED_ON = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "OTEL_RESOURCE_ATTRIBUTES")
_SPECIAL = f"{OVERRIDE_PREFIX}BINARY_SHA"


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    What the container is made from, beside the settings.

    `image_id` is `sha256:<hex>`; `address` is "" on a network whose engine assigns addresses (R2).
    """

    image: str
    image_id: str
    address: str
    socket: str
    environ: Mapping[str, str]
    labels: Mapping[str, str]


def identity_labels(
    existing: Mapping[str, Any] | None, image_id: str, environ: Mapping[str, str], bpffs: str = BPF_FS
) -> dict[str, str]:
    """
    The two labels by which the released CLI adopts a control plane: its own values, kept when it is replaced.

    From CLAWKER_CP_BINARY_SHA and CLAWKER_HOST_BPFFS_SOURCE; else those of the container that is replaced, when
    they were not made from its own image; else from the image.
    """
    own = image_id.removeprefix("sha256:")
    labels = (existing or {}).get("Config", {}).get("Labels") or {}
    old = str((existing or {}).get("Image", "")).removeprefix("sha256:")
    kept = labels.get(BINARY, "")
    return {
        BINARY: environ.get(_SPECIAL) or (kept if kept and kept != old else own),
        BPFFS: environ.get("CLAWKER_HOST_BPFFS_SOURCE") or labels.get(BPFFS, "") or bpffs,
    }


def mounts(directories: Directories, tree: AuthTree, socket: str) -> list[dict[str, Any]]:
    """
    Every bind, in a stable order; only the optional intermediate may be missing from the tree.
    """
    material = [
        (tree.path(source), f"{AUTH}/{target}", True)
        for source, target in MATERIAL.items()
        if source not in (AGENTS_CA.certificate, AGENTS_CA.key) or tree.path(source).exists()
    ]
    binds = [
        (directories.config, CONFIG, True),
        *material,
        (Path(CGROUPS), CGROUPS, True),
        (Path(socket), DOCKER_SOCKET, True),
        (directories.logs, LOGS, False),
        (Path(BPF_FS), BPF_FS, False),
        (directories.firewall, f"{DATA}/firewall", False),
        (directories.data / "controlplane", f"{DATA}/controlplane", False),
    ]
    return [bind(source, target, read_only=read_only) for source, target, read_only in binds]


def bind(source: Path | str, target: str, *, read_only: bool) -> dict[str, Any]:
    """
    A file or directory of the host as the engine is asked for it.
    """
    return {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": read_only}


def variables(directories: Directories, wanted: Wanted) -> list[str]:
    """
    The environment beside the image's own: where the host's directories are, and settings given by variable.
    """
    environ = wanted.environ
    found = {
        "TZ": "UTC",
        "DOCKER_HOST": f"unix://{DOCKER_SOCKET}",
        "CLAWKER_HOST_CONFIG_DIR": str(directories.config),
        "CLAWKER_HOST_DATA_DIR": str(directories.data),
        "CLAWKER_HOST_STATE_DIR": str(directories.state),
        "CLAWKER_HOST_CACHE_DIR": str(directories.cache),
        "CLAWKER_HOST_BPFFS_SOURCE": wanted.labels[BPFFS],
        _SPECIAL: wanted.labels[BINARY],
    }
    for name, sudo in (("CLAWKER_HOST_UID", "SUDO_UID"), ("CLAWKER_HOST_GID", "SUDO_GID")):
        value = environ.get(name) or environ.get(sudo)
        if value:
            found[name] = value
    for name, value in environ.items():
        if name in _PASSED_ON or (name.startswith(OVERRIDE_PREFIX) and not name.startswith(f"{OVERRIDE_PREFIX}BUILD_")):
            found.setdefault(name, value)
    return [f"{name}={value}" for name, value in sorted(found.items())]


def published(settings: Settings) -> list[int]:
    """
    The ports that are published, on the host's loopback only (1.1).
    """
    ports = settings.cli.control_plane
    return [ports.admin_port, ports.hydra_public_port, ports.health_port, settings.metrics_port]


def create_body(settings: Settings, directories: Directories, tree: AuthTree, wanted: Wanted) -> dict[str, Any]:
    """
    The engine's create request, with the digest of all of it as a label.

    Settings and certificates are part of the digest: the server reads the former once, and a mount shows the
    file that was there at the start.
    """
    ports = published(settings)
    health = f"http://{LOOPBACK}:{settings.cli.control_plane.health_port}/healthz"
    probe = f"import urllib.request as r; r.urlopen({health!r}, timeout=3)"
    endpoint: dict[str, Any] = {"IPAMConfig": {"IPv4Address": wanted.address}} if wanted.address else {}
    body: dict[str, Any] = {
        "Image": wanted.image,
        "Cmd": ["serve", "--log-dir", LOGS],
        "User": "0:0",
        "Env": variables(directories, wanted),
        "Labels": {MANAGED: "true", PURPOSE: "controlplane", **wanted.labels},
        "ExposedPorts": {f"{port}/tcp": {} for port in ports},
        "Healthcheck": {
            "Test": ["CMD", "python3", "-ISc", probe],
            "Interval": 5_000_000_000,
            "Timeout": 4_000_000_000,
            "StartPeriod": 90_000_000_000,
            "Retries": 3,
        },
        "StopSignal": "SIGTERM",
        "StopTimeout": STOP_S,
        "HostConfig": {
            "Mounts": mounts(directories, tree, wanted.socket),
            "PortBindings": {f"{port}/tcp": [{"HostIp": LOOPBACK, "HostPort": str(port)}] for port in ports},
            "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3},
            "CapDrop": ["ALL"],
            "CapAdd": list(CAPABILITIES),
            "SecurityOpt": ["apparmor=unconfined", "no-new-privileges"],
            "PidMode": "host",
            "CgroupnsMode": "host",
            "ExtraHosts": ["host.docker.internal:host-gateway"],
            "NetworkMode": NETWORK,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "50m", "max-file": "3"}},
        },
        "NetworkingConfig": {"EndpointsConfig": {NETWORK: endpoint}},
    }
    body["Labels"][SPEC] = _digest(body, wanted.image_id, settings, tree)
    return body


def without_bpf_capability(body: Mapping[str, Any]) -> dict[str, Any]:
    """
    The same for an engine that does not know the capability BPF yet; SYS_ADMIN includes what it allows.
    """
    host = body["HostConfig"]
    return {**body, "HostConfig": {**host, "CapAdd": [name for name in host["CapAdd"] if name != "BPF"]}}


def _digest(body: Mapping[str, Any], image_id: str, settings: Settings, tree: AuthTree) -> str:
    certificates = [tree.path(name) for name in MATERIAL if name.endswith(".pem") and tree.path(name).exists()]
    stable = {**body, "Image": image_id}  # the name of an image says nothing about what is in it
    digest = hashlib.sha256(orjson.dumps(stable, option=orjson.OPT_SORT_KEYS))
    digest.update(msgspec.json.encode(settings))
    for certificate in certificates:
        digest.update(certificate.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done about the container: `create`, `keep`, `start` or `replace`, and why."""

    action: str
    why: str = ""


def decide(existing: Mapping[str, Any] | None, body: Mapping[str, Any], image_id: str) -> Decision:
    """
    Compare the engine's record of the container with that name to the one that is wanted.

    Raises `Conflict` for a container that nobody made to be a control plane.
    """
    if existing is None:
        return Decision("create")
    refuse_foreign(existing)
    labels = existing["Config"].get("Labels") or {}
    if labels.get(SPEC) == body["Labels"][SPEC]:
        return Decision("keep") if is_running(existing) else Decision("start", "it had stopped")
    if not labels.get(SPEC):
        return Decision("replace", "it was made by another program")
    if existing.get("Image") != image_id:
        return Decision("replace", "the image is another one")
    return Decision("replace", "settings, ports, mounts or certificates are others")


def refuse_foreign(existing: Mapping[str, Any]) -> None:
    """
    Raise `Conflict` for a container of that name that nobody made to be a control plane.
    """
    labels = existing["Config"].get("Labels") or {}
    if labels.get(MANAGED) != "true" or labels.get(PURPOSE) != "controlplane":
        raise Conflict(
            f"there is a container named {NAME} that is no control plane",
            hint=f"give it another name: docker rename {NAME} NAME",
        )


def is_running(existing: Mapping[str, Any]) -> bool:
    """
    Whether it runs and is not about to be started again after a failure.
    """
    state = existing["State"]
    return bool(state.get("Running")) and not state.get("Restarting")


def last_word(log: str) -> str:
    """
    The line of a log that says best why something failed: the last error, else the last line.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    fallback = lines[-1] if lines else ""
    for line in reversed(lines):
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError:
            if line.startswith("clawker-cp: "):
                return line.removeprefix("clawker-cp: ")
            continue
        if isinstance(entry, dict) and entry.get("level") in {"error", "critical"}:
            return " ".join(str(entry[key]) for key in ("event", "message", "cause") if entry.get(key))
    return fallback
