"""Tests of resource names."""

from __future__ import annotations

from clawker_cp.firewall.envoy.stems import assign_stems


def test_stems_stay_with_their_holders() -> None:
    """A newcomer that looks like somebody else gets the suffix, whatever the order of the text."""
    alone = assign_stems(["b.a.com"])
    both = assign_stems(["b.a.com", "b-a.com"], alone)
    fresh = assign_stems(["b.a.com", "b-a.com"])

    assert both["b.a.com"] == "b_a_com"
    assert both["b-a.com"].startswith("b_a_com_")
    assert len(both["b-a.com"]) == len("b_a_com_") + 6
    assert set(fresh.values()) != {"b_a_com"}
    assert len(set(fresh.values())) == 2
