"""
Worlds that several files test in: a Docker daemon, and a bridge whose control plane is a container.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from clawker_cp.testing.bridge_world import AS_CONTAINER, Yard, yard
from clawker_cp.testing.docker_world import DockerWorld
from clawker_cp.testing.world import HostNamespace


@pytest_asyncio.fixture
async def docker() -> AsyncIterator[DockerWorld]:
    """A daemon with nothing in it, on a machine of its own."""
    async with HostNamespace() as host, DockerWorld(host) as world:
        yield world


@pytest.fixture(params=[False, True], ids=["bridge-alone", "bridge-nf-call"])
async def contained(request: pytest.FixtureRequest) -> AsyncIterator[Yard]:
    """The control plane is a container; with and without the host's rules seeing bridged packets."""
    async with yard(AS_CONTAINER, bridged_calls=request.param) as made:
        yield made
