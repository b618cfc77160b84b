"""
What a plan lets an agent reach without the proxy: the passing spans of address rules. Pure.

The host ring is opened by `passed`, and connections are cut by `passes`; both read the same rows
as the kernel does (R9: the longest prefix holds everything that covers it).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from clawker_cp.firewall.plan import CidrRow, IPNetwork, Plan, RouteAction


@dataclass(frozen=True, slots=True)
class DirectSpan:
    """Ports of a network that one policy passes, and where inside it longer prefixes say otherwise."""

    network: IPNetwork
    l4: int
    low: int
    high: int


def passed(plan: Plan, policy: int) -> Iterator[DirectSpan]:
    """
    Every passing span of a policy.

    The ring knows no exceptions inside a prefix: it may let through what a longer prefix denies,
    and the kernel's own programs then refuse it.
    """
    for row in plan.cidrs.values():
        if row.policy == policy:
            for span in row.spans:
                if span.action == RouteAction.PASS:
                    yield DirectSpan(row.prefix, row.l4, span.low, span.high)


def passes(plan: Plan, policy: int, l4: int, address: str, port: int) -> bool:
    """
    Whether a policy passes an address and port directly, by the longest prefix that holds it.
    """
    target = ipaddress.ip_address(address)
    best: CidrRow | None = None
    for row in plan.cidrs.values():
        if row.policy != policy or row.l4 != l4 or row.prefix.version != target.version or target not in row.prefix:
            continue
        if best is None or row.prefix.prefixlen > best.prefix.prefixlen:
            best = row
    spans = best.spans if best is not None else ()
    return any(span.low <= port <= span.high and span.action == RouteAction.PASS for span in spans)
