"""Health is what was asked just now; silence and surprises are failures."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from clawker_cp.errors import Unavailable
from clawker_cp.runtime.health import Health, HealthRegistry
from clawker_cp.testing.clock import FakeClock
from clawker_cp.wiring import health_keeper
from clawker_cp.wiring.health_keeper import Answer, Check, HealthKeeper, answered


async def fine() -> Answer:
    return Health.OK, ""


async def broken() -> Answer:
    raise Unavailable("maps cannot be written")


async def silent() -> Answer:
    await asyncio.Event().wait()
    raise AssertionError


async def test_one_round_asks_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A component that fails or never answers does not keep the others from being asked."""
    monkeypatch.setattr(health_keeper, "PROBE_LIMIT_S", 0.02)
    registry = HealthRegistry()
    keeper = HealthKeeper(registry, [Check("a", broken, critical=True), Check("b", silent), Check("c", fine, "x", "1")])
    await keeper.ask_all()
    seen = {one.name: (one.health, one.detail, one.critical, one.implementation) for one in registry.components()}
    assert seen == {
        "a": (Health.FAILED, "maps cannot be written", True, ""),
        "b": (Health.FAILED, "TimeoutError", False, ""),
        "c": (Health.OK, "", False, "x"),
    }


async def test_the_first_critical_failure_is_told_after_each_round() -> None:
    """Whoever says how the whole is hears of critical components only, and when they are well again."""
    registry, heard = HealthRegistry(), list[str]()
    answers = {"a": (Health.FAILED, ""), "b": (Health.FAILED, "")}

    async def hear(failed: str) -> None:
        heard.append(failed)

    async def ask(name: str) -> Answer:
        return answers[name]

    checks = [Check("a", partial(ask, "a")), Check("b", partial(ask, "b"), critical=True)]
    keeper = HealthKeeper(registry, checks, tell=hear)
    await keeper.ask_all()
    answers["b"] = (Health.DEGRADED, "")
    await keeper.ask_all()
    assert heard == ["b", ""]


async def test_it_asks_again_every_two_seconds() -> None:
    """What recovers is seen to, and since when."""
    clock = FakeClock()
    registry = HealthRegistry(clock)
    answers: list[Answer] = [(Health.FAILED, "down"), (Health.OK, "")]

    async def changing() -> Answer:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    keeper = HealthKeeper(registry, [Check("dns", changing)], clock)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(keeper.run())
        while not clock.sleeping:
            await asyncio.sleep(0)
        first = registry.component("dns")
        await clock.advance(2.0)
        while not clock.sleeping:
            await asyncio.sleep(0)
        second = registry.component("dns")
        running.cancel()
    assert first is not None and second is not None
    assert (first.health, second.health) == (Health.FAILED, Health.OK)
    assert second.since_unix - first.since_unix == 2


async def test_what_is_off_is_not_asked() -> None:
    """A stopped part is off, not broken; a running one that says no has failed."""
    said = {"off": True}

    async def no() -> bool:
        return False

    ask = answered(no, lambda: said["off"])
    assert (await ask())[0] is Health.OFF
    said["off"] = False
    assert (await ask())[0] is Health.FAILED
