"""
Port spans: joining overlapping ones, carving denied out of allowed (contract 7.6).

Pure arithmetic on inclusive (low, high) pairs. Used by the compile, by effective rules, and by
the merge to see that an opaque rule says nothing new.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

PortRange = tuple[int, int]  # inclusive, low <= high


def join(spans: Iterable[PortRange]) -> list[PortRange]:
    """Sort spans and join those that overlap or touch."""
    joined: list[PortRange] = []
    for low, high in sorted(spans):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return joined


def carve(allowed: Iterable[PortRange], denied: Iterable[PortRange]) -> list[PortRange]:
    """Return what is left of `allowed` without `denied`, sorted and joined."""
    holes = join(denied)
    left: list[PortRange] = []
    for low, high in join(allowed):
        for hole_low, hole_high in holes:
            if hole_high < low:
                continue
            if hole_low > high:
                break
            if hole_low > low:
                left.append((low, hole_low - 1))
            low = hole_high + 1
        if low <= high:
            left.append((low, high))
    return left


def covers(spans: Iterable[PortRange], port: int) -> bool:
    """Whether one of the spans holds the port."""
    return any(low <= port <= high for low, high in spans)


def segments(spans: Iterable[PortRange]) -> list[PortRange]:
    """Cut spans at each other's borders: every input span is a union of returned ones, none overlap."""
    depth: dict[int, int] = {}  # border -> spans that begin minus spans that ended just before
    for low, high in spans:
        depth[low] = depth.get(low, 0) + 1
        depth[high + 1] = depth.get(high + 1, 0) - 1
    cut: list[PortRange] = []
    open_spans = 0
    for border, after in itertools.pairwise(sorted(depth)):
        open_spans += depth[border]
        if open_spans:
            cut.append((border, after - 1))
    return cut
