"""
What a plan lets an agent reach without the proxy: the passing spans of address rules. Pure.

The host ring is opened by `passed`, and connections are cut by `passes`; both read the same rows
as the kernel does (R9: the longest prefix holds everything that covers it).
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from clawker_cp.firewall.plan import CidrRow, IPNetwork, Plan, RouteAction
from clawker_cp.firewall.spans import join


@dataclass(frozen=True, slots=True)
class DirectSpan:
    """Ports of a network that one policy passes, everywhere in it."""

    network: IPNetwork
    l4: int
    low: int
    high: int


def passed(plan: Plan, policy: int) -> Iterator[DirectSpan]:
    """
    Every passing span of a policy, on exactly the addresses that its prefix decides.

    The ring has no exceptions inside a prefix and is the only judge of frames that an agent makes itself, which no
    socket program sees: a network in which a longer prefix says otherwise is told in pieces around that.
    """
    rows = sorted(
        (row for row in plan.cidrs.values() if row.policy == policy),
        key=lambda row: (row.l4, row.prefix.version, int(row.prefix.network_address), row.prefix.prefixlen),
    )
    for index, row in enumerate(rows):
        inside = list(itertools.takewhile(partial(_holds, row), itertools.islice(rows, index + 1, None)))
        for low, high in join((span.low, span.high) for span in row.spans if span.action == RouteAction.PASS):
            closed = [other.prefix for other in inside if not _covers(other, low, high)]
            for network in _without(row.prefix, closed):
                yield DirectSpan(network, row.l4, low, high)


def _holds(row: CidrRow, other: CidrRow) -> bool:
    same = (other.l4, other.prefix.version) == (row.l4, row.prefix.version)
    return same and other.prefix.network_address in row.prefix


def _covers(row: CidrRow, low: int, high: int) -> bool:
    spans = join((span.low, span.high) for span in row.spans if span.action == RouteAction.PASS)
    return any(first <= low and high <= last for first, last in spans)


def _without(network: IPNetwork, closed: Iterable[IPNetwork]) -> list[IPNetwork]:
    """What is left of a network without networks inside it, which come in order of their addresses."""
    first, left = int(network.network_address), []
    for one in closed:
        begin, end = int(one.network_address), int(one.broadcast_address)
        if begin > first:
            left += _summary(network, first, begin - 1)
        first = max(first, end + 1)
    if first <= int(network.broadcast_address):
        left += _summary(network, first, int(network.broadcast_address))
    return left


def _summary(network: IPNetwork, first: int, last: int) -> list[IPNetwork]:
    make = ipaddress.IPv4Address if network.version == 4 else ipaddress.IPv6Address
    return list(ipaddress.summarize_address_range(make(first), make(last)))


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
