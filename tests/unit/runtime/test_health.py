"""
Health of components and the probes of /healthz.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from clawker_cp.errors import NotFound, Unavailable
from clawker_cp.runtime.health import Component, Health, HealthRegistry, Probes
from clawker_cp.testing.clock import FakeClock


async def test_since_is_of_the_present_health() -> None:
    """`since` moves when health changes, not when only the detail does; listeners hear of both."""
    clock = FakeClock(wall_ns=2_000_000_000)
    health, heard = HealthRegistry(clock), list[Component]()
    health.declare("envoy", implementation="wheel", critical=True)
    health.on_change(heard.append)

    health.report("envoy", Health.FAILED, "no pid")
    await clock.advance(10)
    health.report("envoy", Health.FAILED, "exit 1")
    health.report("envoy", Health.FAILED, "exit 1")
    failed = health.first_failed()
    await clock.advance(10)
    health.report("envoy", Health.OK)

    assert [(c.health, c.detail, c.since_unix) for c in heard] == [
        (Health.FAILED, "no pid", 2), (Health.FAILED, "exit 1", 2), (Health.OK, "", 22),
    ]  # fmt: skip
    assert failed is not None
    assert failed.name == "envoy"
    assert health.first_failed() is None


def test_only_critical_components_turn_red() -> None:
    """A failed exporter is seen and does not make the server unhealthy."""
    health = HealthRegistry()
    health.declare("telemetry")
    health.report("telemetry", Health.FAILED)

    assert health.first_failed() is None
    with pytest.raises(NotFound, match="'dsn'"):
        health.report("dsn", Health.OK)


async def test_first_failing_probe_wins() -> None:
    """Probes are asked in order up to the first that fails, and the answer is kept."""
    clock, asked = FakeClock(), list[str]()

    def probe(name: str, result: bool | Exception) -> tuple[str, Callable[[], Awaitable[bool]]]:
        async def ask() -> bool:
            asked.append(name)
            if isinstance(result, Exception):
                raise result
            return result

        return name, ask

    probes = Probes([probe("a", True), probe("b", Unavailable("x")), probe("c", False)], clock)
    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(probes.failed()) for _ in range(3)]

    assert [task.result() for task in answers] == ["b"] * 3
    assert asked == ["a", "b"]
    await clock.advance(2)
    await probes.failed()
    assert asked == ["a", "b"] * 2
