"""
Containers that come and go leave nothing in the server or the kernel.
"""

from __future__ import annotations

import os

import pytest

from clawker_cp.testing.docker_load import come_and_go, kept
from clawker_cp.testing.docker_machine import docker_machine
from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.served import serving

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.envoy, pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

COUNT = int(os.environ.get("CLAWKER_TEST_CONTAINERS", "12"))  # 200 by hand


async def test_nothing_is_left_of_containers_that_came_and_went() -> None:
    """Rows, links, threads and descriptors do not grow with the containers, after the first few warmed things up."""
    async with docker_machine() as machine, serving(machine.machine) as served:
        await come_and_go(machine, 4)
        before = await kept(machine, served)
        await come_and_go(machine, COUNT)
        after = await kept(machine, served)

    assert (before.rows, after.rows) == (0, 0)
    assert after.links <= 1  # the last ones are let go by the next sweep
    # Pools of threads fill up to their bound; what leaks grows with each container.
    assert after.threads - before.threads < COUNT / 2
    assert after.descriptors - before.descriptors < COUNT / 2
