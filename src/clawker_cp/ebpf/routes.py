"""
Route, address and proxy-port rows: what changed between two tables, and writing it safely.

Up to `SMALL` changed rows are written in place in the order that never opens (proxy ports of new
routes first, removed routes before removed ports). More are written as a new generation that
becomes valid with one word (ruling R10).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from clawker_cp._fast import layout
from clawker_cp.ebpf.config import IPNetwork, mapped_prefix

SMALL = 256
NO_RULE = 0xFFFFFFFF


class RouteLike(Protocol):
    """`firewall.plan.RouteRow`."""

    @property
    def policy(self) -> int: ...
    @property
    def identity(self) -> int: ...
    @property
    def port(self) -> int: ...
    @property
    def l4(self) -> int: ...
    @property
    def action(self) -> int: ...
    @property
    def proxy_port(self) -> int: ...
    @property
    def rule(self) -> int: ...
    @property
    def expires_at(self) -> float: ...


class SpanLike(Protocol):
    """`firewall.plan.Span`."""

    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...
    @property
    def action(self) -> int: ...
    @property
    def proxy_port(self) -> int: ...
    @property
    def rule(self) -> int: ...
    @property
    def expires_at(self) -> float: ...


class CidrLike(Protocol):
    """`firewall.plan.CidrRow`."""

    @property
    def policy(self) -> int: ...
    @property
    def l4(self) -> int: ...
    @property
    def prefix(self) -> IPNetwork: ...
    @property
    def spans(self) -> Sequence[SpanLike]: ...


class ProxyPortLike(Protocol):
    """`firewall.plan.ProxyPort`."""

    @property
    def policy(self) -> int: ...
    @property
    def l4(self) -> int: ...
    @property
    def port(self) -> int: ...


Rows = dict[bytes, bytes]


@dataclass(slots=True)
class Table:
    """Kernel rows of one table, keyed without the generation (which `rekey` puts in front)."""

    routes: Rows = field(default_factory=dict)
    cidrs: Rows = field(default_factory=dict)
    ports: Rows = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.routes) + len(self.cidrs) + len(self.ports)


def build_table(
    routes: Iterable[RouteLike],
    cidrs: Iterable[CidrLike],
    ports: Iterable[ProxyPortLike],
    deadline_ns: Callable[[float], int],
) -> Table:
    """
    Lay rows out for generation 0; `deadline_ns` turns Unix seconds into kernel time.
    """
    table = Table()
    for route in routes:
        key = layout.pack_route_key(0, route.policy, route.identity, route.port, route.l4)
        table.routes[key] = layout.pack_route_value(
            int(route.action), route.proxy_port, route.rule & NO_RULE, deadline_ns(route.expires_at)
        )
    for cidr in cidrs:
        addr, bits = mapped_prefix(cidr.prefix)
        key = layout.pack_cidr_key(0, cidr.policy, cidr.l4, addr, bits)
        table.cidrs[key] = layout.pack_spans(
            [
                (s.low, s.high, int(s.action), s.proxy_port, s.rule & NO_RULE, deadline_ns(s.expires_at))
                for s in cidr.spans
            ]
        )
    for port in ports:
        table.ports[layout.pack_proxy_port(0, port.policy, port.port, port.l4)] = b"\1\0\0\0"
    return table


def kernel_deadline_ns(expires_at: float) -> int:
    """
    A Unix time in seconds as CLOCK_MONOTONIC nanoseconds; 0 stays 0, the past becomes 1.
    """
    if not expires_at:
        return 0
    return max(1, time.monotonic_ns() + int((expires_at - time.time()) * 1e9))


def rekey_routes(rows: Mapping[bytes, bytes], generation: int) -> Rows:
    """
    The same rows under another generation (the key's first word, host order).
    """
    head = generation.to_bytes(4, "little")
    return {head + key[4:]: value for key, value in rows.items()}


def rekey_cidrs(rows: Mapping[bytes, bytes], generation: int) -> Rows:
    """
    The same prefixes under another generation (after the prefix length, network order).
    """
    head = generation.to_bytes(4, "big")
    return {key[:4] + head + key[8:]: value for key, value in rows.items()}


def identities(table: Table) -> set[int]:
    """
    The identities that have a row for any port of any policy.
    """
    return {layout.unpack_route_key(key)[2] for key in table.routes}


def under(table: Table, generation: int) -> Table:
    """
    A whole table under another generation.
    """
    return Table(
        rekey_routes(table.routes, generation),
        rekey_cidrs(table.cidrs, generation),
        rekey_routes(table.ports, generation),
    )


def new(old: Mapping[bytes, bytes], wanted: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """
    Rows that are not in `old`, or not with that value.
    """
    return {key: value for key, value in wanted.items() if old.get(key) != value}


def gone(old: Mapping[bytes, bytes], wanted: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """
    Rows whose key is not wanted any more.
    """
    return {key: value for key, value in old.items() if key not in wanted}


def differences(old: Mapping[bytes, bytes], wanted: Mapping[bytes, bytes]) -> int:
    """
    How many rows would be written or removed.
    """
    return len(new(old, wanted)) + len(gone(old, wanted))


def join(rows: Mapping[bytes, bytes]) -> tuple[bytes, bytes]:
    """
    Keys and values, each as one piece for a batch.
    """
    return b"".join(rows.keys()), b"".join(rows.values())
