"""
What is done inside network namespaces of processes: cutting a container's sockets, listing the host's addresses.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import structlog

from clawker_cp.engines.host import network
from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.engines.host.sockets import SocketInfo, cut_sockets
from clawker_cp.errors import NotFound, Unavailable

log = structlog.get_logger()

OWN = Path("/proc/self/ns/net")
TOOL_LIMIT_S = 10.0


def cut_inside(namespace: Path, host: Path | None, match: Callable[[SocketInfo], bool]) -> int:
    """
    Destroy the sockets of a namespace that match, unless it is the host's: those are not the container's alone.

    Blocks. Raises `NotFound` when the namespace is gone.
    """
    try:
        shared = namespace.samefile(host or OWN)
    except OSError as error:
        raise NotFound(f"network namespace {namespace} is gone") from error
    if shared:
        log.warning("engines_cut_skipped", namespace=str(namespace), cause="the host's own network namespace")
        return 0
    return cut_sockets(namespace, match)


async def host_addresses(namespace: Path | None) -> list[str]:
    """
    Every address of the host's interfaces; `namespace` is the host's where that is not ours.
    """
    if namespace is None:
        return await network.host_addresses()
    return await asyncio.to_thread(in_netns, namespace, _listed)


def _listed() -> list[str]:
    # A child belongs to the namespace of the thread that starts it.
    try:
        done = subprocess.run(
            ["ip", "-j", "addr", "show"], check=True, capture_output=True, text=True, timeout=TOOL_LIMIT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"ip addr show: {error}") from error
    return [info["local"] for link in json.loads(done.stdout) for info in link.get("addr_info", ()) if "local" in info]
