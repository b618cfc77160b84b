"""The kernel side is looked at every second while the firewall is on; what cannot be mended is said once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import structlog

from clawker_cp.errors import Unavailable
from clawker_cp.testing.clock import FakeClock
from clawker_cp.wiring.link_guard import LOOK_EVERY_S, LinkGuard, told


class Mender:
    """Says what it is told to, and counts."""

    def __init__(self, *left: str) -> None:
        self.left: Sequence[str] = left
        self.looks = 0

    def faults(self) -> Sequence[str]:
        return self.left

    def mend(self) -> Sequence[str]:
        self.looks += 1
        return self.left


@pytest.mark.parametrize(
    ("faults", "line"), [((), ""), (("one",), "one"), (("one", "two", "three"), "one, and 2 more")]
)
def test_faults_are_one_line(faults: tuple[str, ...], line: str) -> None:
    """The first and how many others, however many there are."""
    assert told(faults) == line


async def test_what_stays_broken_is_said_once_and_refuses() -> None:
    """One event when it begins and one when it ends; between them nothing may be opened."""
    mender = Mender("the parent is not judged by x")
    guard = LinkGuard(mender, lambda: True)
    with structlog.testing.capture_logs() as logs:
        await guard.mend()
        await guard.mend()
        with pytest.raises(Unavailable, match="the parent is not judged by x"):
            guard.require_whole()
        assert "repair" in await guard.fault()
        mender.left = ()
        await guard.mend()
    guard.require_whole()
    assert await guard.fault() == ""
    assert [one["event"] for one in logs] == ["enforcement_unavailable", "enforcement_recovered"]
    assert logs[0]["cause"] == "the parent is not judged by x" and logs[0]["retry_s"] == LOOK_EVERY_S


async def test_it_looks_every_second_and_only_while_the_firewall_is_on() -> None:
    """Off, nothing is asked and nothing is refused."""
    clock, mender, up = FakeClock(), Mender("x"), [True]
    guard = LinkGuard(mender, lambda: up[0], clock)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(guard.run())
        await clock.wait_sleeping()
        up[0] = False
        with pytest.raises(Unavailable):
            guard.require_whole()
        await clock.advance(LOOK_EVERY_S)
        await clock.wait_sleeping()
        running.cancel()
    assert mender.looks == 1
    guard.require_whole()
