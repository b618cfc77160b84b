"""
Destinations that no rule, bypass or learning opens (R12): the agents' subnet, this host's own addresses, and what
is never routed; and ports of the proxy's bands that other programs of this host have (R4).
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from clawker_cp.config import Settings
from clawker_cp.dns.gate import Gate
from clawker_cp.ebpf import Manager
from clawker_cp.engines.base import AgentNetwork
from clawker_cp.firewall.plan import TCP, UDP, Topology
from clawker_cp.firewall.reconcile import Reconciler

NEVER_ROUTED = ("127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4", "0.0.0.0/8", "::1/128", "fe80::/10")


PROXY_PORTS = range(10000, 32000)
_LISTENS, _UNCONNECTED = "0A", "07"  # states of /proc/net/tcp and udp


class EngineLike(Protocol):
    """An engine, as far as addresses are concerned."""

    @property
    def network(self) -> AgentNetwork: ...
    async def host_addresses(self) -> list[str]: ...


class RingLike(Protocol):
    """The ring around the agents' bridge."""

    async def reserve(self, networks: Iterable[str]) -> None: ...


async def learn_addresses(
    settings: Settings, engine: EngineLike, ring: RingLike | None, policy: Reconciler, manager: Manager, gate: Gate
) -> None:
    """
    Tell compile, kernel, gate and ring what is reserved, with this host's addresses as they are now.
    """
    addresses = await engine.host_addresses()
    busy = await asyncio.to_thread(busy_ports)
    reserved = tuple(ipaddress.ip_network(text) for text in (engine.network.subnet, *NEVER_ROUTED, *addresses))
    policy.use_topology(
        Topology(
            reserved=reserved,
            http3=settings.envoy.http3,
            tls_minimal=settings.firewall.tls_auto == "minimal",
            busy=busy,
        )
    )
    manager.set_reserved(reserved)
    gate.set_reserved(reserved)
    if ring is not None:
        await ring.reserve([str(network) for network in reserved])


def busy_ports(net: Path = Path("/proc/net")) -> frozenset[tuple[int, int]]:
    """
    (protocol, port) of the proxy's bands on which something of this host listens at every address.

    The proxy listens at the gateway's alone, so its own are not among them. Files that are not there hold nothing.
    """
    found = set()
    for name, l4, state in (
        ("tcp", TCP, _LISTENS), ("tcp6", TCP, _LISTENS), ("udp", UDP, _UNCONNECTED), ("udp6", UDP, _UNCONNECTED),
    ):  # fmt: skip
        try:
            rows = (net / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, now, *_ = row.split()
            address, _, port = local.partition(":")
            if now == state and not address.strip("0") and int(port, 16) in PROXY_PORTS:
                found.add((l4, int(port, 16)))
    return frozenset(found)
