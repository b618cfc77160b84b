"""
Packet filters of rings are found by their name, in a network namespace of the test's own.
"""

from __future__ import annotations

import pytest

from clawker_cp.engines.docker.ring import DockerRing
from clawker_cp.engines.host.ring import HostRing
from clawker_cp.engines.host.tables import remove_rings
from clawker_cp.testing.bridge_world import AS_CONTAINER, yard

pytestmark = [pytest.mark.root, pytest.mark.slow]


async def test_rings_of_both_engines_go_and_nothing_else_does() -> None:
    """Whatever their bridges are called; a table of somebody else stays, and a second time there is nothing."""
    async with yard(AS_CONTAINER) as made:
        host = HostRing("clawker0", "10.231.80.0/20", "10.231.80.1")
        made.sh("nft", host.script([]))
        made.sh("nft", "add table inet theirs")
        first, again = [await remove_rings(made.host.pid) for _ in range(2)]
        left = made.sh("nft", "list", "tables")
        await made.ring.install([])  # what the ring removes at its end is there again

    assert isinstance(made.ring, DockerRing)
    names = ["br-ckwtest", "clawker0"]
    assert first == sorted(
        f"{f} clawker_{n}" for f in ("arp", "bridge", "inet") for n in names if (f, n) != ("arp", names[1])
    )
    assert again == [] and "clawker" not in left and "table inet theirs" in left
