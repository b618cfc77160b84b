"""
Destinations that no rule, bypass or learning opens (R12): the agents' subnet, this host's own addresses, and what
is never routed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Protocol

from clawker_cp.config import Settings
from clawker_cp.dns.gate import Gate
from clawker_cp.ebpf import Manager
from clawker_cp.engines.base import AgentNetwork
from clawker_cp.firewall.plan import Topology
from clawker_cp.firewall.reconcile import Reconciler

NEVER_ROUTED = ("127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4", "0.0.0.0/8", "::1/128", "fe80::/10")


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
    reserved = tuple(ipaddress.ip_network(text) for text in (engine.network.subnet, *NEVER_ROUTED, *addresses))
    policy.use_topology(
        Topology(reserved=reserved, http3=settings.envoy.http3, tls_minimal=settings.firewall.tls_auto == "minimal")
    )
    manager.set_reserved(reserved)
    gate.set_reserved(reserved)
    if ring is not None:
        await ring.reserve([str(network) for network in reserved])
