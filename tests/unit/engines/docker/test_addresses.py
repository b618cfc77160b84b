"""Addresses remembered, no longer than they are certain."""

from __future__ import annotations

from typing import Any

import pytest

from clawker_cp.engines.base import AgentContainer
from clawker_cp.engines.docker import addresses
from clawker_cp.engines.docker.addresses import LIFE_S, AddressCache
from clawker_cp.testing.clock import FakeClock

LABELS = {"dev.clawker.managed": "true", "dev.clawker.purpose": "agent"}


def agent(number: str = "a", address: str = "10.0.0.2", pid: int = 7, **changes: Any) -> AgentContainer:
    values: dict[str, Any] = {"labels": LABELS, "running": True, "address": address, "pid": pid, **changes}
    return AgentContainer(number * 64, f"clawker.{number}", **values)


class Processes(dict[int, int]):
    """Start times by process id."""

    def __call__(self, pid: int) -> int:
        return self.get(pid, 0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def processes() -> Processes:
    return Processes({7: 100, 8: 200})


@pytest.fixture
def cache(clock: FakeClock, processes: Processes) -> AddressCache:
    return AddressCache(clock, processes)


async def test_kept_until_its_life_is_over(cache: AddressCache, clock: FakeClock) -> None:
    """An answer is remembered for its life and not a moment longer."""
    cache.keep(agent(), cache.mark())
    await clock.advance(LIFE_S - 0.1)
    assert cache.at("10.0.0.2") == [agent()]
    await clock.advance(0.2)

    assert cache.at("10.0.0.2") == []
    assert len(cache) == 0


def test_answer_asked_for_before_a_change_is_not_kept(cache: AddressCache) -> None:
    """What was on its way while something changed may be of before: it is not remembered."""
    mark = cache.mark()
    cache.forget("b" * 64)
    cache.keep(agent(), mark)
    assert cache.at("10.0.0.2") == []
    mark = cache.mark()
    cache.clear()
    cache.keep(agent(), mark)

    assert cache.at("10.0.0.2") == []


@pytest.mark.parametrize("now", [0, 101])
def test_address_of_a_dead_process_is_not_its_any_more(cache: AddressCache, processes: Processes, now: int) -> None:
    """A process that ended, or whose number another has by now, owns no address, although no event came yet."""
    cache.keep(agent(), cache.mark())
    processes[7] = now

    assert cache.at("10.0.0.2") == []


def test_one_doubt_drops_all_of_an_address(cache: AddressCache, processes: Processes) -> None:
    """Two had the address and one is gone: the engine is asked, the other is not believed alone."""
    cache.keep(agent("a", pid=7), cache.mark())
    cache.keep(agent("b", pid=8), cache.mark())
    assert len(cache.at("10.0.0.2")) == 2
    processes[8] = 0

    assert cache.at("10.0.0.2") == []
    assert len(cache) == 0


@pytest.mark.parametrize(
    "other",
    [agent(running=False), agent(address=""), agent(labels={}), agent(pid=9)],
    ids=["stopped", "bare", "no agent", "dead"],
)
def test_only_running_agents_with_an_address_are_kept(cache: AddressCache, other: AgentContainer) -> None:
    """Who could not be asked for is not remembered, and replaces what was remembered of it."""
    cache.keep(agent(), cache.mark())
    cache.keep(other, cache.mark())

    assert len(cache) == 0


def test_unseen_process_is_kept_by_time_alone(cache: AddressCache) -> None:
    """Where the engine's processes cannot be seen, events and time have to do."""
    cache.keep(agent(pid=0), cache.mark())

    assert cache.at("10.0.0.2") == [agent(pid=0)]


def test_full_cache_lets_the_oldest_go(cache: AddressCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of remembered agents is bounded."""
    monkeypatch.setattr(addresses, "MAX_ENTRIES", 2)
    for number, address in (("a", "10.0.0.2"), ("b", "10.0.0.3"), ("c", "10.0.0.4")):
        cache.keep(agent(number, address), cache.mark())

    assert len(cache) == 2
    assert cache.at("10.0.0.2") == []
