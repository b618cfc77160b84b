"""What the server does with a host that is empty, and with an engine that cannot say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from clawker_cp.agents.watcher import AgentWatcherOptions
from clawker_cp.config import DrainSettings
from clawker_cp.errors import Unavailable
from clawker_cp.runtime.health import Health, HealthRegistry
from clawker_cp.testing.clock import FakeClock
from clawker_cp.wiring.drain_to_zero import DrainToZero, watcher_options
from clawker_cp.wiring.event_bridge import topic_of

OPTIONS = AgentWatcherOptions(poll_interval=10, missed_threshold=2, grace_period=15, list_error_ceiling=3)


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.health = HealthRegistry(self.clock)
        self.answer: Any = 0
        self.polls = 0
        self.drained = 0
        self.drain = DrainToZero(self.list_agents, self.on_drain, OPTIONS, self.health, clock=self.clock)

    async def list_agents(self) -> Any:
        self.polls += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def on_drain(self) -> None:
        self.drained += 1

    def engine(self) -> Health | None:
        component = self.health.component("engine")
        return component.health if component is not None else None

    async def polls_later(self, count: int) -> None:
        for _ in range(count):
            await self.clock.advance(10)


async def answers_well() -> tuple[Health, str]:
    return Health.OK, "2 running"


@pytest.fixture
def world() -> World:
    return World()


def test_settings_become_options() -> None:
    """The keys of `drain`; a grace of 0 means none there, not the default."""
    assert watcher_options(DrainSettings()) == AgentWatcherOptions()
    options = watcher_options(DrainSettings(grace_s=0, poll_s=5, zero_polls=1, list_failures=7))
    assert (options.poll_interval, options.missed_threshold, options.list_error_ceiling) == (5, 1, 7)
    assert 0 < options.grace_period < 0.001


async def test_an_empty_host_ends_it(world: World) -> None:
    """The callback ran once and `run` is over."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(world.drain.run())
        await asyncio.sleep(0)
        await world.polls_later(2)

    assert task.result() is None
    assert (world.drained, world.engine()) == (1, None)


async def test_a_ceiling_is_an_alarm_and_polling_goes_on(world: World) -> None:
    """Event, red `engine`, never a drain; again after as many failures; well again with the first answer."""
    world.answer = OSError("no such socket")
    guarded = world.drain.guarded(answers_well)
    with capture_logs() as logs:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(world.drain.run())
            await asyncio.sleep(0)
            await world.polls_later(2)
            before = await guarded()
            await world.polls_later(1)
            failed = world.engine(), await guarded(), world.drain.failing
            await world.polls_later(3)
            polls = world.polls
            world.answer = ["a"]
            await world.polls_later(1)
            recovered = world.engine(), await guarded(), world.drain.failing
            world.answer = []
            await world.polls_later(1)
            early = world.drained
            await world.polls_later(1)

    assert before == (Health.OK, "2 running")
    assert failed[0] is Health.FAILED
    assert failed[1] == (Health.FAILED, failed[2])
    assert "OSError: no such socket" in failed[2]
    assert polls == 6
    assert recovered == (Health.OK, (Health.OK, "2 running"), "")
    assert (early, world.drained) == (0, 1)
    assert task.done()
    alarms = [line for line in logs if line["event"] == "drain_list_failed"]
    assert [(line["cause"], line["failures"], line["log_level"]) for line in alarms] == [
        ("no such socket", 3, "error")
    ] * 2
    assert [line["event"] for line in logs].count("drain_list_recovered") == 1


def test_operators_see_the_alarm() -> None:
    """Both lines are events of the control surface."""
    assert topic_of("drain_list_failed") == "enforcement"
    assert topic_of("drain_list_recovered") == "health"


async def test_a_failed_drain_is_raised(world: World) -> None:
    """What the callback raises is not taken for a list that failed, and nothing is polled again."""

    async def failing() -> None:
        raise Unavailable("no")

    drain = DrainToZero(world.list_agents, failing, OPTIONS, world.health, clock=world.clock)
    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.TaskGroup() as group:
            group.create_task(drain.run())
            await asyncio.sleep(0)
            await world.polls_later(5)

    assert [str(error) for error in raised.value.exceptions] == ["no"]
    assert world.polls == 2


@pytest.mark.parametrize("failures", [0, 1, 3])
async def test_cancelled_it_leaves_nothing(world: World, failures: int) -> None:
    """Before, between and after ceilings."""
    world.answer = OSError("down")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(world.drain.run())
        await world.clock.wait_sleeping()
        await world.polls_later(failures)
        task.cancel()

    assert task.cancelled()
    assert world.clock.sleeping == 0
    assert world.drained == 0
