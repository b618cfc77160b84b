"""The first thing a reader runs has to work, and to be true."""

from __future__ import annotations

import asyncio
import sys

import pytest

from clawker_cp.demo import EVIL, STEPS

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.envoy]


async def test_the_tour_goes_as_explained() -> None:
    """Every step ends as its text says, nothing refused reaches the far end, and the exit code tells so."""
    tour = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "clawker_cp.demo",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(110):
            said = (await tour.communicate())[0].decode()
    finally:
        if tour.returncode is None:
            tour.kill()
            await tour.wait()

    assert tour.returncode == 0, said
    assert [f"{n}. {step.title}" for n, step in enumerate(STEPS, 1) if f"\n{n}. {step.title}\n" not in said] == []
    assert f"packets to {EVIL}: 0" in said
