"""
What this host has of what enforcement needs: the preflight table. Looks only; changes nothing.
"""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from functools import partial
from pathlib import Path

from clawker_cp.config import Settings, environment
from clawker_cp.engines.base import HostFeature
from clawker_cp.engines.docker_client import endpoint_from, socket_path
from clawker_cp.engines.host.cgroups import find_cgroup2
from clawker_cp.engines.host.network import gateway_of
from clawker_cp.engines.host.preflight import host_features
from clawker_cp.errors import ClawkerError, InvalidInput
from clawker_cp.firewall.envoy.options import find_binary

# What only sandboxes of the host engine need.
_OF_SANDBOXES = frozenset(("bwrap", "bridge", "setpriv", "setsid", "limits", "seccomp"))


def preflight(settings: Settings, *, engine: str = "host") -> list[HostFeature]:
    """
    What this host has of what enforcement with an engine needs. Looks only; changes nothing.
    """
    root = os.geteuid() == 0
    nothing = "nothing can be enforced"
    pin_parent = Path(settings.firewall.pin_dir).parent
    docker = _daemon_socket().exists()
    rows = [
        HostFeature(
            "root", root, required=True, detail="running as root" if root else "not root", need="run with sudo",
            cost=nothing,
        ),
        HostFeature(
            "kernel", _kernel_at_least(6, 2), required=True, detail=platform.release(), need="Linux 6.2 or later",
            cost=nothing,
        ),
        HostFeature(
            "BTF", Path("/sys/kernel/btf/vmlinux").exists(), required=True, detail="/sys/kernel/btf/vmlinux",
            need="a kernel with CONFIG_DEBUG_INFO_BTF", cost=nothing,
        ),
        HostFeature(
            "bpffs", _is_bpffs(pin_parent), required=True, detail=str(pin_parent),
            need=f"mount -t bpf bpf {pin_parent}", cost="enforcement would not survive the control plane",
        ),
    ]  # fmt: skip
    for name, find in (("cgroup2", find_cgroup2), ("envoy", partial(find_binary, settings.envoy.binary))):
        try:
            rows.append(HostFeature(name, True, required=True, detail=str(find())))
        except ClawkerError as error:
            rows.append(HostFeature(name, False, required=True, detail=str(error), need=error.hint or "", cost=nothing))
    for row in host_features(settings.host.bridge, settings.host.subnet, gateway_of(settings.host.subnet)):
        if row.name == "host ring":
            rows.append(replace(row, required=settings.firewall.host_ring))
        elif engine == "host" or row.name not in _OF_SANDBOXES:
            rows.append(row)
    rows.append(
        HostFeature(
            "docker", docker, required=engine == "docker", detail="daemon socket" if docker else "no daemon",
            need="a Docker daemon", cost="sandboxes of this host only",
        )
    )  # fmt: skip
    return rows


def _daemon_socket() -> Path:
    try:
        return Path(socket_path(endpoint_from(environment())))
    except InvalidInput:
        return Path("/nonexistent")  # told where it is used


def _kernel_at_least(major: int, minor: int) -> bool:
    numbers = platform.release().split("-")[0].split(".")
    return tuple(int(n) for n in numbers[:2] if n.isdecimal()) >= (major, minor)


def _is_bpffs(path: Path) -> bool:
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return False
    return any(line.split()[4] == str(path) and " - bpf " in line for line in mounts.splitlines())
