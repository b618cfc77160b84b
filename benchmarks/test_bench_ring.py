"""
One change of the Docker ring, a transaction of `nft`, among 1 and among 100 agents that are pinned and admitted.

The same on an empty table is what starting `nft` costs by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from clawker_cp.engines.docker.ring_rules import Pin
from clawker_cp.engines.host.commands import in_host, run
from clawker_cp.engines.host.direct import Direct
from clawker_cp.testing.bridge_world import AS_CONTAINER, Yard, yard

pytestmark = pytest.mark.root
DIRECT = [[Direct("198.51.100.0/24", 6, low, low + 9)] for low in (443, 8443)]


def pin(number: int) -> Pin:
    return Pin(f"vethbench{number}", f"10.231.97.{number}", f"02:42:0a:e7:61:{number:02x}")


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


@pytest.fixture(scope="module", params=[1, 100])
def crowd(request: pytest.FixtureRequest, loop: asyncio.AbstractEventLoop) -> Iterator[tuple[Yard, int]]:
    around = yard(AS_CONTAINER)
    made = loop.run_until_complete(around.__aenter__())
    try:
        loop.run_until_complete(made.ring.install([pin(number) for number in range(1, request.param + 1)]))
        for number in range(1, request.param + 1):
            loop.run_until_complete(made.ring.admit(pin(number).address, DIRECT[0]))
        yield made, request.param
    finally:
        loop.run_until_complete(around.__aexit__(None, None, None))


async def start(made: Yard) -> None:
    await run(*in_host(made.host.pid), "nft", "-f", "-", text="add table inet nothing\n")


async def pin_and_unpin(made: Yard) -> None:
    one = pin(200)
    await made.ring.pin(one.interface, one.address, mac=one.mac)
    await made.ring.unpin(one.interface, one.address)


async def admit_twice(made: Yard) -> None:
    for direct in (*DIRECT[::-1],):
        await made.ring.admit(pin(1).address, direct)


async def bypass(made: Yard) -> None:
    await made.ring.admit_all(pin(1).address, 60)


@pytest.mark.benchmark(group="docker ring")
@pytest.mark.parametrize("work", [start, pin_and_unpin, admit_twice, bypass])
def test_change(
    benchmark: Any,
    loop: asyncio.AbstractEventLoop,
    crowd: tuple[Yard, int],
    work: Callable[[Yard], Coroutine[Any, Any, None]],
) -> None:
    """Pin with unpin, two admissions, one bypass."""
    benchmark.pedantic(lambda: loop.run_until_complete(work(crowd[0])), rounds=20, warmup_rounds=1)
