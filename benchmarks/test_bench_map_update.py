"""
Writing 1, 100 and 10,000 routes: our bridge in one batch, against one system call a row through the same
bridge, ctypes over the same libbpf, and Debian's python3-bpfcc.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import pytest

from clawker_cp._fast import bpfmap, layout
from clawker_cp.testing.pinned_routes import ThroughCtypes, loaded_manager, through_bcc

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with loaded_manager() as (_, directory):
        yield directory


def rows(count: int) -> tuple[list[bytes], list[bytes]]:
    keys = [layout.pack_route_key(9, 1 + n // 4096, 256 + n % 4096, 443, 6) for n in range(count)]
    return keys, [layout.pack_route_value(1, 10000, n % 97, 0) for n in range(count)]


def best(work: Any, rounds: int = 9) -> float:
    taken = []
    for _ in range(rounds):
        began = perf_counter_ns()
        work()
        taken.append(perf_counter_ns() - began)
    return min(taken)


@pytest.mark.parametrize("count", [1, 100, 10_000])
def test_bench_map_update(benchmark: Any, directory: Path, count: int) -> None:
    """The bridge's batch against every peer, as ratios in one run."""
    keys, values = rows(count)
    joined = b"".join(keys), b"".join(values)
    bridge = bpfmap.BpfMap.pinned(str(directory / "route_map"), *layout.SIZES["route_map"])
    peer = ThroughCtypes(directory / "route_map")

    def each() -> None:
        for key, value in zip(keys, values, strict=True):
            bridge.put(key, value)

    try:
        benchmark.group = f"map_update {count}"
        benchmark.pedantic(lambda: bridge.put_many(*joined), rounds=15, warmup_rounds=2)
        ours = benchmark.stats.stats.min * 1e9 if benchmark.enabled else best(lambda: bridge.put_many(*joined), 1)
        peers = {
            "bridge, one row a call": best(each),
            "ctypes, batch": best(lambda: peer.batch(*joined, count)),
            "ctypes, one row a call": best(lambda: peer.each(keys, values)),
        }
        bcc = through_bcc(directory / "route_map", keys, values)
        if bcc is not None:
            peers["python3-bpfcc, one row a call"] = bcc
    finally:
        bridge.close()
        peer.close()
    print(f"\n{count:>6} routes: bridge, batch {ours / count:8.0f} ns a row")
    for name, taken in peers.items():
        print(f"        {name:<30} {taken / count:8.0f} ns a row, {taken / ours:5.2f} x")
