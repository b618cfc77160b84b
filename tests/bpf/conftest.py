"""Shared by the tests of the kernel side: the loaded test object, and what makes a skip earned."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from clawker_cp.testing.bpf_cases import Decisions, built


@pytest.fixture(scope="session")
def needs_kernel() -> None:
    """Skip without the privilege; with CLAWKER_CP_REQUIRE_BPF=1 that is a failure."""
    if os.geteuid() != 0:
        if os.environ.get("CLAWKER_CP_REQUIRE_BPF") == "1":
            pytest.fail("CLAWKER_CP_REQUIRE_BPF is set, but this is not root")
        pytest.skip("needs root to load BPF programs")


@pytest.fixture(scope="session")
def loaded(needs_kernel: None) -> Iterator[Decisions]:
    """The compiled decisions, loaded once."""
    built()
    decisions = Decisions()
    yield decisions
    decisions.close()


@pytest.fixture
def kernel(loaded: Decisions) -> Decisions:
    """The compiled decisions with empty route tables."""
    loaded.next_generation()
    for name in ("reserved_map", "dns_cache", "inbound_map", "inbound_flow", "state_map", "metrics_map"):
        for key in loaded.maps[name].keys():
            loaded.maps[name].delete(key)
    loaded.events()
    loaded.state(0)
    loaded.state(5)
    return loaded
