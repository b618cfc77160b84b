"""Learnt addresses: rows in the kernel's map with their mirror, quotas and expiry."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from clawker_cp._fast import bpfmap, layout
from clawker_cp.ebpf.config import NameRow, mapped
from clawker_cp.ebpf.names import LearntNames
from clawker_cp.errors import CapacityExceeded
from clawker_cp.testing.bpf_abi import OBJECTS

pytestmark = pytest.mark.root

AGENT = 4242
ADDR = mapped("203.0.113.1")
HOUR_NS = 3600 * 10**9


def routed() -> range:
    """Every name leads somewhere."""
    return range(256, 1000)


@pytest.fixture
def cache() -> Iterator[bpfmap.BpfMap]:
    """The kernel's map, of this test's own and pinned nowhere."""
    loaded = bpfmap.BpfObject.load(str(OBJECTS / "decide.bpf.o"), pin_dir=None, agent_level=1, max_agents=8)
    opened = loaded.map("dns_cache", *layout.SIZES["dns_cache"])
    yield opened
    opened.close()
    loaded.close()


def told(identity: int, expires_ns: int = 0) -> NameRow:
    return NameRow(ADDR, identity, expires_ns or time.monotonic_ns() + HOUR_NS)


def identities(cache: bpfmap.BpfMap) -> list[tuple[int, ...]]:
    return [layout.unpack_name(key, value)[2] for key, value in cache.items()]


def test_the_newest_name_of_an_address_is_first(cache: bpfmap.BpfMap) -> None:
    """Names of one address are kept with the last told in front, at most four, and the fifth changes nothing."""
    names = LearntNames(cache, routed)
    for identity in (300, 301, 302, 300, 303):
        names.update(AGENT, [told(identity)])
    with pytest.raises(CapacityExceeded, match="four names"):
        names.update(AGENT, [told(304)])
    assert identities(cache) == [(303, 300, 302, 301)]
    assert len(names) == 1


def test_names_that_left_the_rules_make_room(cache: bpfmap.BpfMap) -> None:
    """Of four names of an address those that lead nowhere any more go for a fifth, and 2, no name, stays."""
    led = {301, 304}
    names = LearntNames(cache, lambda: led)
    for identity in (2, 300, 301, 302, 304):
        names.update(AGENT, [told(identity)])
    assert identities(cache) == [(304, 301, 2)]


def test_expired_names_make_room_and_are_collected(cache: bpfmap.BpfMap) -> None:
    """What is past its time counts neither for the four nor for long."""
    names = LearntNames(cache, routed)
    names.update(AGENT, [told(300, time.monotonic_ns() - 1)])
    names.update(AGENT, [told(301, time.monotonic_ns() - 1)])
    assert identities(cache) == [(301,)]
    assert (names.collect(), identities(cache), len(names)) == (1, [], 0)


def test_an_agents_rows_go_and_come_back_with_it(cache: bpfmap.BpfMap) -> None:
    """Another mirror adopts what the map holds; forgetting an agent takes its rows only."""
    names, following = LearntNames(cache, routed), LearntNames(cache, routed)
    names.update(AGENT, [told(300)])
    names.update(AGENT + 1, [told(301)])
    following.adopt()
    assert len(following) == 2
    following.forget(AGENT)
    following.forget(AGENT)
    assert (identities(cache), len(following)) == ([(301,)], 1)
