"""
Zones, failover and single flight.
"""

from __future__ import annotations

import asyncio

import pytest

from clawker_cp.dns.forwarders import Forwarders
from clawker_cp.testing.dns_world import Resolver

RECORDS = {("www.example.com", "A"): ["@ 60 A 203.0.113.1"]}
KEY = b"\3www\7example\3com\0\0\1"


def forwarders(*addresses: str, **zones: tuple[str, ...]) -> Forwarders:
    return Forwarders(addresses, {zone.replace("_", "."): own for zone, own in zones.items()}, try_s=0.1, tries=3)


async def test_longest_zone_wins() -> None:
    """Of nested zones the longest has its forwarders asked."""
    async with Resolver(RECORDS).serve() as one, Resolver(RECORDS).serve() as other:
        asked = forwarders("127.0.0.1:1", com=(one.address,), example_com=(other.address,))
        answer = await asked.resolve(KEY, "www.example.com")
    assert (answer.zone, answer.own_zone, answer.failed) == ("example.com", True, False)
    assert (len(one.asked), len(other.asked)) == (0, 1)


async def test_failure_is_said() -> None:
    """Without any answer the result is marked failed after so many tries; the next question is asked anew."""
    asked = forwarders("127.0.0.1:1")
    for _ in range(2):
        assert (await asked.resolve(KEY, "www.example.com")).failed
    assert asked.asked == 6
    assert not asked.healthy
    assert (await forwarders().resolve(KEY, "www.example.com")).failed


async def test_refusing_forwarder_is_followed_by_the_next() -> None:
    """SERVFAIL and REFUSED of one are not the last word, and do not make it ill."""
    async with Resolver(RECORDS).serve() as broken, Resolver(RECORDS).serve() as good:
        broken.rcode = 5
        asked = forwarders(broken.address, good.address)
        assert (await asked.resolve(KEY, "www.example.com")).rcode == 0
        assert asked.healthy
        assert len(broken.asked) == 1


async def test_one_that_leads_may_be_stopped() -> None:
    """If the first of those who wait is cancelled, nobody waits for ever."""
    resolver = Resolver(RECORDS)
    resolver.held = asyncio.Event()
    async with resolver.serve(), asyncio.TaskGroup() as group:
        asked = Forwarders((resolver.address,), {}, try_s=5, tries=1)
        first = group.create_task(asked.resolve(KEY, "www.example.com"))
        second = group.create_task(asked.resolve(KEY, "www.example.com"))
        async with asyncio.timeout(5):
            while not resolver.asked:
                await asyncio.sleep(0)
        first.cancel()
        for task in (first, second):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert asked.pending == 0
