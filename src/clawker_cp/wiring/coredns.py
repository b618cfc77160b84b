"""
CoreDNS behind the gate, where the settings name a binary (contract 8.7, ruling R5).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from clawker_cp.config import Directories, Settings
from clawker_cp.dns.coredns import CHILD_ADDRESS, CHILD_HEALTH_PORT, corefile
from clawker_cp.errors import InvalidInput
from clawker_cp.processes.coredns import CoreDnsChild
from clawker_cp.wiring.agent_side import Part


class CoreDns(Protocol):
    """A child, or a container: `processes.coredns`, `coredns_container`."""

    running: bool

    async def run(self) -> None: ...


def coredns_child(settings: Settings, directories: Directories) -> CoreDnsChild | None:
    """
    The child that `dns.coredns` asks for, None without one. Raises `InvalidInput` for what cannot be run.
    """
    if not settings.dns.coredns:
        return None
    binary = shutil.which(settings.dns.coredns)
    if binary is None:
        raise InvalidInput(
            f"dns.coredns: {settings.dns.coredns} cannot be run", hint="name CoreDNS's binary, or leave it empty"
        )
    return CoreDnsChild(
        Path(binary),
        directories.firewall / "coredns" / "Corefile",
        corefile(settings.dns.forwarders, settings.dns.zones),
        f"http://{CHILD_ADDRESS}:{CHILD_HEALTH_PORT}/health",
    )


def coredns_part(child: CoreDns | None) -> list[Part]:
    """
    What has to run beside serving, where it is asked for.
    """
    return [] if child is None else [("coredns", child.run, "the gate asks the forwarders itself")]


def problem_of(child: CoreDns | None) -> Callable[[], str] | None:
    """
    A question whose answer is what is wrong with it now, "" if nothing is; None where it is not asked for.
    """
    if child is None:
        return None
    return lambda: "" if child.running else "CoreDNS does not run; the gate asks the forwarders itself"
