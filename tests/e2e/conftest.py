"""
One outside world and one machine per module.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from clawker_cp.testing.machine import Machine, machine_with_world


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[Machine]:
    async with machine_with_world() as made:
        yield made
