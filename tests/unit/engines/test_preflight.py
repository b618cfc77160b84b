"""The host engine's rows of the preflight table."""

from __future__ import annotations

import pytest

from clawker_cp.engines.host.preflight import host_features


@pytest.mark.root
def test_every_missing_feature_says_what_it_needs_and_costs() -> None:
    """Each row has a detail; a missing one also its need and its cost; asking changes nothing."""
    rows = {row.name: row for row in host_features("clawker0", "10.231.80.0/20", "10.231.80.1")}
    assert {"bwrap", "nft", "limits", "seccomp", "host ring", "bridge filter"} <= rows.keys()
    for row in rows.values():
        assert row.detail
        assert row.present or (row.need and row.cost)
    assert rows["host ring"].present, rows["host ring"].detail
    assert rows["bwrap"].as_mapping()["present"] is True
