"""The end of a server, stage by stage."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import structlog

from clawker_cp.errors import Unavailable
from clawker_cp.runtime.drain import LEAST_S, Drain
from clawker_cp.testing.clock import FakeClock


async def test_stages_run_once_and_none_takes_the_others_along() -> None:
    """Of two ways to the end the second finds done what the first did; a failing stage is said and left behind."""
    ran: list[str] = []
    ending = Drain(25)

    async def fails() -> None:
        ran.append("fails")
        raise Unavailable("gone")

    async def surprises() -> None:
        ran.append("surprises")
        raise RuntimeError("what")

    async def fine() -> None:
        ran.append("fine")

    assert not ending.begun
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            ending.begin(agents=3)
            for name, work in (("a", fails), ("b", surprises), ("c", fine)):
                await ending.stage(name, work)

    assert ending.begun and ran == ["fails", "surprises", "fine"]
    assert [(line["event"], line.get("stage"), line.get("agents")) for line in lines] == [
        ("drain_started", None, 3),
        ("drain_stage_failed", "a", None),
        ("drain_stage_failed", "b", None),
        ("drain_stage", "c", None),
    ]


async def test_all_stages_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage gets what those before it left, and a moment at least."""
    clock = FakeClock()
    ending = Drain(25, clock)
    given: list[float] = []
    real = asyncio.timeout

    def timeout(seconds: float) -> asyncio.Timeout:
        given.append(seconds)
        return real(seconds)

    monkeypatch.setattr(asyncio, "timeout", timeout)

    async def takes(seconds: float) -> None:
        await clock.advance(seconds)

    for name, seconds in (("a", 20.0), ("b", 10.0), ("c", 0.0)):
        await ending.stage(name, partial(takes, seconds))

    assert given == [25, 5, LEAST_S]


async def test_a_cancelled_stage_ends_the_drain() -> None:
    """A second signal is passed on at once."""
    ending = Drain(25)
    begun = asyncio.Event()

    async def waits() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(ending.stage("a", waits))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
