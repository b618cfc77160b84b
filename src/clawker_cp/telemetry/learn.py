"""
The rules a `--learn` run would have needed. Pure, over the flow records of one agent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from clawker_cp.telemetry.enrich import is_address
from clawker_cp.telemetry.flows import ALLOWED, BYPASSED, KERNEL, PROXY, REDIRECTED, Flow

_PASSED = frozenset({ALLOWED, BYPASSED, REDIRECTED})
_SSH = 22


@dataclass(frozen=True, slots=True, order=True)
class Destination:
    """What a rule would have to name; `port` 0 = that of the protocol."""

    host: str
    proto: str
    port: int
    path: str = ""
    method: str = ""


def learned(flows: Iterable[Flow], name_of: Callable[[str], str] = lambda _address: "") -> list[Destination]:
    """
    The least that would have sufficed for what a learning run reached: names first, then addresses, sorted.

    Every order of the same records gives the same list. A flow past the proxy is named by its own
    record, else by `name_of(address)`, else by its address. Left out is what another rule covers: ordinary
    requests where WebSockets were opened too, and bytes to what the proxy named. ICMP
    and raw packets have no rule and are left out too.
    """
    named: set[Destination] = set()
    opaque: set[tuple[str, str, int]] = set()
    for flow in flows:
        if flow.verdict not in _PASSED or not flow.port:
            continue
        host = flow.host or name_of(flow.address) or flow.address
        if flow.layer == PROXY and host and flow.reason != "origin_error":
            named.add(Destination(host, "https" if flow.proto == "quic" else flow.proto, flow.port))
        elif flow.layer == KERNEL and flow.reason == "learn" and host and flow.proto in {"tcp", "udp"}:
            opaque.add((host, flow.proto, flow.port))
    judged = {(target.host, target.port) for target in named if target.proto != "udp"}
    found = {target for target in named if not _covered(target, named)}
    for host, proto, port in opaque:
        if proto == "udp" or (host, port) not in judged:
            found.add(Destination(host, "ssh" if (proto, port) == ("tcp", _SSH) else proto, port))
    return sorted(found, key=lambda d: (is_address(d.host), d.host, d.port, d.proto))


def _covered(target: Destination, named: set[Destination]) -> bool:
    """A WebSocket rule also speaks for ordinary requests of its name and port; the other way round it does not."""
    stronger = {"https": "wss", "http": "ws"}.get(target.proto)
    return stronger is not None and Destination(target.host, stronger, target.port) in named
