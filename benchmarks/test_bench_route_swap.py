"""
Replacing 10,000 kernel routes: a new generation and one word, against deleting all and inserting, and an inner map.

Budget: 5 ms, one system call a batch, atomic. What agents wait for is the system calls; building the rows'
bytes happens before, on the side of the server, and is shown apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import pytest

from clawker_cp._fast import layout
from clawker_cp.ebpf import Manager
from clawker_cp.testing.pinned_routes import InnerMaps, loaded_manager

pytestmark = pytest.mark.root
COUNT = 10_000


@dataclass(frozen=True)
class Row:
    policy: int
    identity: int
    port: int
    l4: int = 6
    action: int = 1
    proxy_port: int = 10000
    rule: int = 0
    expires_at: float = 0.0


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    with loaded_manager() as (manager, _):
        yield manager


def table(turn: int) -> list[Row]:
    return [Row(1 + n // 4096, 256 + n % 4096, 1000 + turn % 1000) for n in range(COUNT)]


def test_bench_route_swap(benchmark: Any, manager: Manager) -> None:
    """A swap by generation against delete-all-then-insert of the same rows, in one run."""
    turn = 0

    def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal turn
        turn += 1
        manager._drop_stale()  # the old generation's second is over: its removal is not what is measured
        return (table(turn), (), ()), {}

    manager.sync_routes(table(0), (), ())
    manager._stale = None if manager._stale is None else (0.0, manager._stale[1])
    benchmark.group = "route_swap"
    benchmark.pedantic(lambda *rows: manager.sync_routes(*rows), setup=prepare, rounds=7)
    whole = benchmark.stats.stats.median * 1e3 if benchmark.enabled else 0.0

    routes = manager._maps["route_map"]
    keys = b"".join(layout.pack_route_key(77, 1 + n // 4096, 256 + n % 4096, 443, 6) for n in range(COUNT))
    values = layout.pack_route_value(1, 10000, 0, 0) * COUNT
    swaps, inserts = [], []
    inner = InnerMaps(len(keys) // COUNT, len(values) // COUNT, 262_144)
    control = manager._maps["control"]
    word = control.get(bytes(4))
    assert word is not None
    replaced = []
    for _ in range(15 if benchmark.enabled else 1):
        began = perf_counter_ns()
        inner.replace(keys, values, COUNT)
        replaced.append(perf_counter_ns() - began)
        began = perf_counter_ns()
        routes.put_many(keys, values)
        control.put(bytes(4), word)
        swaps.append(perf_counter_ns() - began)
        began = perf_counter_ns()
        routes.delete_many(keys)
        routes.put_many(keys, values)
        inserts.append(perf_counter_ns() - began)
        routes.delete_many(keys)
    inner.close()
    print(f"\nsync_routes of {COUNT} changed rows, bytes and system calls: {whole:.1f} ms")
    base = statistics.median(swaps)
    for name, series in {
        "new generation and its word (budget 5 ms)": swaps,
        "delete all, then insert: closed meanwhile": inserts,
        "inner map filled and replaced": replaced,
    }.items():
        middle = statistics.median(series)
        print(f"{name:<44}{middle / 1e6:7.2f} ms, best {min(series) / 1e6:6.2f}, {middle / base:5.2f} x")
