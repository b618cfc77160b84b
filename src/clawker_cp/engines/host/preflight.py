"""
What this host has of what sandboxes need, as rows of the preflight table.

Looks and asks only; changes nothing. Called by the application before a start and by `check`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from clawker_cp.engines.base import HostFeature
from clawker_cp.engines.host.cgroups import find_cgroup2, read_mounts
from clawker_cp.engines.host.ring import HostRing
from clawker_cp.engines.host.seccomp import filter_program
from clawker_cp.errors import Unsupported

LIMIT_S = 5.0
TOOLS = {
    "bwrap": "bubblewrap",
    "ip": "iproute2",
    "bridge": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "setsid": "util-linux",
}
_NO_SANDBOX = "no sandbox can be made"


def host_features(bridge: str, subnet: str, gateway: str) -> list[HostFeature]:
    """
    One row for each thing the host engine uses; blocks for two short processes.
    """
    return [
        *(_tool(name, package) for name, package in TOOLS.items()),
        _limits(),
        _seccomp(),
        _ring(bridge, subnet, gateway),
        _bridge_netfilter(),
    ]


def _tool(name: str, package: str) -> HostFeature:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    return HostFeature(
        name, found is not None, required=True, detail=found or "not found", need=f"apt-get install {package}",
        cost=_NO_SANDBOX,
    )  # fmt: skip


def _limits() -> HostFeature:
    missing = {"memory", "cpu", "pids"}
    try:
        missing -= set((find_cgroup2() / "cgroup.controllers").read_text().split())
    except (OSError, Unsupported):
        return HostFeature("limits", False, required=False, detail="no cgroup2", need="cgroup2", cost="no limits")
    for mount in read_mounts():
        if mount.kind == "cgroup":
            missing -= mount.options
    return HostFeature(
        "limits", not missing, required=False,
        detail=f"no controller for {', '.join(sorted(missing))}" if missing else "memory, cpu, pids",
        need="the cgroup controllers memory, cpu and pids",
        cost="sandboxes run without these limits, and say so",
    )  # fmt: skip


def _seccomp() -> HostFeature:
    try:
        filter_program()
    except Unsupported as error:
        return HostFeature(
            "seccomp", False, required=False, detail=str(error), need=error.needs,
            cost="sandboxes have to be started without the system call filter",
        )  # fmt: skip
    return HostFeature("seccomp", True, required=False, detail=platform.machine())


def _ring(bridge: str, subnet: str, gateway: str) -> HostFeature:
    need = "nftables with bridge, conntrack, masquerade, fib and log support"
    cost = "packets that pass no socket hook are not stopped on the host (host ring)"
    if os.geteuid():
        return HostFeature(
            "host ring", False, required=True, detail="only root can ask", need="run with sudo", cost=cost
        )
    try:
        # Asked in a namespace of its own: what is there already does not matter to the question.
        done = subprocess.run(
            ["unshare", "--net", "nft", "--check", "-f", "-"],
            input=HostRing(bridge, subnet, gateway).script(()),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return HostFeature("host ring", False, required=True, detail=str(error), need=need, cost=cost)
    words = done.stderr.strip().splitlines()
    return HostFeature(
        "host ring", done.returncode == 0, required=True,
        detail="nftables takes the rules" if done.returncode == 0 else (words[0] if words else "refused"),
        need=need, cost=cost,
    )  # fmt: skip


def _bridge_netfilter() -> HostFeature:
    path = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    on = path.exists() and path.read_text().strip() == "1"
    return HostFeature(
        "bridge filter", True, required=False,
        detail="frames also pass the host's own packet rules" if on else "frames pass the ring only",
    )  # fmt: skip
