"""
What the gate is told once: addresses, forwarders, bounds. Validated where settings are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_FORWARDERS = ("1.1.1.2", "1.0.0.2")


@dataclass(frozen=True, slots=True)
class BudgetSettings:
    """Bounds per (agent, registered domain) and window, in wildcard zones; 0 = off."""

    names: int = 500
    name_bytes: int = 65_536
    txt: int = 100
    window_s: float = 60.0
    domains_per_agent: int = 1024  # registered domains that are counted at once; more are refused


@dataclass(frozen=True, slots=True)
class GateSettings:
    """
    Everything the gate needs besides its collaborators.

    Forwarders are `ADDRESS`, `ADDRESS:PORT` or `[ADDRESS]:PORT`. `address` empty: no agents' side.
    `proxy_view_port` 0: no proxy view; `proxy_view_client`: who alone may ask there, "" = whoever gets there. Ports
    of -1 let the kernel choose (tests).
    """

    address: str = ""
    port: int = 53
    proxy_view_address: str = "127.0.0.1"
    proxy_view_port: int = 9953
    proxy_view_client: str = ""
    forwarders: tuple[str, ...] = DEFAULT_FORWARDERS
    zones: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # zone -> its own forwarders
    front: str = ""  # who is asked before all of them: CoreDNS, "" = nobody
    control_plane_address: str = ""
    host_proxy_address: str = ""
    gateway_address: str = ""
    internal_names: tuple[str, ...] = ("otel-collector", "prometheus")
    budget: BudgetSettings = BudgetSettings()
    ipv6: bool = False
    try_s: float = 2.0
    tries: int = 3
    prepare_s: float = 5.0
    cache_entries: int = 16_384
    cache_bytes: int = 32 << 20
    waiting_per_agent: int = 256  # questions of one agent that wait for something; more get SERVFAIL
    waiting: int = 4096  # the same for all agents
    connections_per_client: int = 16
    connections: int = 1024
    idle_s: float = 10.0
    receive_buffer_bytes: int = 1 << 20
