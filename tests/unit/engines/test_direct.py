"""Making destinations disjoint for one nft set."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.engines.host.direct import Direct, disjoint
from clawker_cp.errors import InvalidInput

ADDRESSES = [f"203.0.113.{last}" for last in (0, 1, 2, 3, 7)]
PORTS = range(12)


@st.composite
def directs(draw: st.DrawFn) -> Direct:
    length = draw(st.sampled_from([29, 30, 31, 32]))
    network = ipaddress.ip_network(f"{draw(st.sampled_from(ADDRESSES))}/{length}", strict=False)
    low, high = sorted((draw(st.integers(0, 11)), draw(st.integers(0, 11))))
    return Direct(str(network), draw(st.sampled_from([6, 17])), low, high)


def covers(item: Direct, address: str, l4: int, port: int) -> bool:
    inside = ipaddress.ip_address(address) in ipaddress.ip_network(item.network)
    return inside and item.l4 == l4 and item.low <= port <= item.high


@given(st.lists(directs(), max_size=8))
def test_same_packets_once_each(items: list[Direct]) -> None:
    """What is covered stays covered, nothing else is, and nothing twice."""
    result = disjoint(items)
    for address in ADDRESSES:
        for l4 in (6, 17):
            for port in PORTS:
                before = any(covers(item, address, l4, port) for item in items)
                assert sum(covers(item, address, l4, port) for item in result) == before


@pytest.mark.parametrize("item", [Direct("203.0.113.0/24", 1, 0, 1), Direct("203.0.113.0/24", 6, 5, 4)])
def test_other_protocols_and_reversed_ports_are_refused(item: Direct) -> None:
    """Only TCP and UDP with a range of ports can be admitted."""
    with pytest.raises(InvalidInput):
        disjoint([item])
