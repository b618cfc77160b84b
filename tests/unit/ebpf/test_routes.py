"""Rows of a plan are laid out for one generation and moved to another without other change."""

from __future__ import annotations

import ipaddress
import time

from clawker_cp.ebpf import routes
from clawker_cp.firewall.plan import TCP, CidrRow, RouteAction, RouteRow, Span


def table(identity: int = 256) -> routes.Table:
    span = Span(low=1, high=443, action=RouteAction.PASS)
    return routes.build_table(
        [RouteRow(1, identity, 443, TCP, RouteAction.PROXY, 10443)],
        [CidrRow(policy=1, l4=TCP, prefix=ipaddress.ip_network("198.51.100.0/24"), spans=(span,))],
        [],
        routes.kernel_deadline_ns,
    )


def test_equal_rows_give_equal_tables() -> None:
    """The layout depends on the rows alone, and identity is part of a route's key."""
    assert table() == table()
    assert table().routes.keys() != table(257).routes.keys()
    assert len(table()) == 2


def test_another_generation_changes_only_its_word() -> None:
    """There and back again gives the same rows; values never change."""
    made = table()
    moved = routes.rekey_routes(made.routes, 0x01020304)
    assert [key[:4] for key in moved] == [b"\4\3\2\1"]
    assert list(moved.values()) == list(made.routes.values())
    assert routes.rekey_routes(moved, 0) == made.routes
    cidrs = routes.rekey_cidrs(made.cidrs, 0x01020304)
    assert [key[4:8] for key in cidrs] == [b"\1\2\3\4"]
    assert routes.rekey_cidrs(cidrs, 0) == made.cidrs


def test_a_deadline_is_never_mistaken_for_none() -> None:
    """0 is no deadline, the past is the first nanosecond, the future lies ahead on the kernel's clock."""
    assert routes.kernel_deadline_ns(0) == 0
    assert routes.kernel_deadline_ns(1.0) == 1
    assert routes.kernel_deadline_ns(time.time() + 60) > time.monotonic_ns() + 50 * 10**9
