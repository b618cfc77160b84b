"""Shared by the tests of the kernel side: the compiled decisions, and agents with real sockets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clawker_cp.testing.bpf_cases import Decisions, built
from clawker_cp.testing.socket_world import SocketWorld


@pytest.fixture(scope="session")
def loaded() -> Iterator[Decisions]:
    """The compiled decisions, loaded once."""
    built()
    decisions = Decisions()
    yield decisions
    decisions.close()


@pytest.fixture
def kernel(loaded: Decisions) -> Decisions:
    """The compiled decisions with empty tables."""
    loaded.next_generation()
    for name in ("reserved_map", "dns_cache", "inbound_map", "inbound_flow", "state_map", "metrics_map"):
        for key in loaded.maps[name].all_keys():
            loaded.maps[name].delete(key)
    loaded.events()
    loaded.state(0)
    loaded.state(5)
    return loaded


@pytest.fixture(scope="module")
def whole_world() -> Iterator[SocketWorld]:
    """Programs attached to a cgroup of this module's own, an agents' network and an outside."""
    with SocketWorld() as made:
        yield made


@pytest.fixture
def world(whole_world: SocketWorld) -> Iterator[SocketWorld]:
    """The world with no agents, no rules, nothing received and nothing recorded yet."""
    whole_world.reset()
    yield whole_world
    whole_world.remove_agents()
