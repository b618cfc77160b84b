"""
CoreDNS behind the gate (contract 8.7): what it is told to do, as text. It forwards and caches; it decides nothing.

Only the gate asks it, with questions of the gate's own making: no client's address, no option of an agent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# As a child of this server (ruling R5); as a container it has an address of its own and the usual ports.
CHILD_ADDRESS, CHILD_PORT, CHILD_HEALTH_PORT, CHILD_METRICS_PORT = "127.0.0.1", 9954, 9955, 9956

CACHED_ANSWERS, CACHED_MAX_S = 10_000, 3600


@dataclass(frozen=True, slots=True)
class CoreDnsPlace:
    """Where it listens: questions, health, metrics."""

    address: str = CHILD_ADDRESS
    port: int = CHILD_PORT
    health_port: int = CHILD_HEALTH_PORT
    metrics_port: int = CHILD_METRICS_PORT


def corefile(
    forwarders: Sequence[str], zones: Mapping[str, Sequence[str]], place: CoreDnsPlace = CoreDnsPlace()
) -> str:
    """
    The configuration: one server block for each zone, and one for everything else.

    A forwarder that is down is noticed by asking it (`health_check`) and left out after one failure: with the
    defaults CoreDNS repeats against a closed port as fast as it can. Negative answers are not kept: the gate decides
    how long a name is unknown. Others are kept as long as they say: by default CoreDNS makes that 5 s at least.
    """
    blocks = [_block(zone.strip("."), servers, place, last=False) for zone, servers in sorted(zones.items())]
    return "\n".join([*blocks, _block("", forwarders, place, last=True)])


def _block(zone: str, forwarders: Sequence[str], place: CoreDnsPlace, *, last: bool) -> str:
    lines = [
        f"bind {place.address}",
        "errors",
        "bufsize 1232",
        f"cache {{\n        success {CACHED_ANSWERS} {CACHED_MAX_S} 0\n        disable denial\n    }}",
        f"forward . {' '.join(forwarders)} {{\n        max_fails 1\n        health_check 500ms\n    }}",
    ]
    if last:
        lines += [
            f"health {place.address}:{place.health_port}",
            f"prometheus {place.address}:{place.metrics_port}",
            "reload 2s",
        ]
    inner = "\n".join(f"    {line}" for line in lines)
    return f"{zone or '.'}:{place.port} {{\n{inner}\n}}\n"
