"""Port spans against a brute-force oracle over ports."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.firewall.spans import carve, covers, join, segments

RANGES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)).map(lambda t: (t[0], t[0] + t[1])), max_size=8)


def ports(spans: list[tuple[int, int]]) -> set[int]:
    """Every port of the spans."""
    return {port for low, high in spans for port in range(low, high + 1)}


@given(RANGES, RANGES)
def test_carving_leaves_exactly_the_ports_that_are_allowed_and_not_denied(
    allowed: list[tuple[int, int]], denied: list[tuple[int, int]]
) -> None:
    """And in sorted spans that neither overlap nor touch."""
    left = carve(allowed, denied)
    assert ports(left) == ports(allowed) - ports(denied)
    assert all(first[1] + 1 < second[0] for first, second in itertools.pairwise(left))


@given(RANGES)
def test_joining_keeps_the_ports(spans: list[tuple[int, int]]) -> None:
    """Joined spans neither overlap nor touch."""
    joined = join(spans)
    assert ports(joined) == ports(spans)
    assert all(first[1] + 1 < second[0] for first, second in itertools.pairwise(joined))
    assert all(covers(joined, port) == (port in ports(spans)) for port in range(60))


@given(RANGES)
def test_segments_have_the_same_covering_spans_throughout(spans: list[tuple[int, int]]) -> None:
    """So one decision per segment is a decision for each of its ports."""
    found = segments(spans)
    assert ports(found) == ports(spans)
    assert sum(high - low + 1 for low, high in found) == len(ports(spans))
    for low, high in found:
        sets = {tuple(a <= port <= b for a, b in spans) for port in range(low, high + 1)}
        assert len(sets) == 1


def test_the_examples_of_the_contract() -> None:
    """7.6."""
    assert carve([(4242, 4250)], [(4246, 4246)]) == [(4242, 4245), (4247, 4250)]
    assert carve([(4245, 4245)], [(4242, 4250)]) == []
    assert carve([(4242, 4242)], [(4242, 4242)]) == []
