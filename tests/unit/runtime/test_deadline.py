"""
Time budgets.
"""

from __future__ import annotations

import asyncio

import pytest

from clawker_cp.errors import DeadlineExceeded
from clawker_cp.runtime.deadline import Deadline
from clawker_cp.testing.clock import FakeClock


async def test_steps_share_the_budget() -> None:
    """A step gets the smaller of its own cap and what is left."""
    clock = FakeClock()
    deadline = Deadline.after(5, clock)

    assert deadline.cap(2) == 2
    await clock.advance(4)
    assert deadline.cap(2) == pytest.approx(1)
    assert deadline.sooner(0.5).remaining() == pytest.approx(0.5)
    assert deadline.sooner(50).remaining() == pytest.approx(1)
    await clock.advance(2)
    assert deadline.expired
    assert deadline.remaining() == 0


async def test_limit_says_what_was_waited_for() -> None:
    """A wait that is too long raises our error, which is a TimeoutError too."""
    with pytest.raises(DeadlineExceeded, match="the proxy's answer took longer than 0.01 s"):
        async with Deadline.after(60).limit(0.01, "the proxy's answer"):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError):
        async with Deadline.after(-1).limit(1, "nothing"):
            await asyncio.Event().wait()


async def test_timeouts_of_others_pass() -> None:
    """A TimeoutError that comes from inside stays what it was."""
    with pytest.raises(TimeoutError, match="inner") as caught:
        async with Deadline.never().limit(5, "x"):
            raise TimeoutError("inner")

    assert not isinstance(caught.value, DeadlineExceeded)
