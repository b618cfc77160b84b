"""The compiled-policy types."""

from __future__ import annotations

from clawker_cp.firewall.plan import (
    IDENTITY_BYPASS,
    IDENTITY_CATCH_ALL,
    IDENTITY_FIRST,
    IDENTITY_HTTP,
    IDENTITY_HTTP_TCP,
    PathEntry,
    PathPolicy,
    RouteAction,
)


def test_fixed_identities_lie_below_the_allocated_ones() -> None:
    """They are shared with the kernel's ABI header and never change."""
    fixed = [IDENTITY_CATCH_ALL, IDENTITY_HTTP, IDENTITY_BYPASS, IDENTITY_HTTP_TCP]
    assert fixed == [1, 2, 3, 4] and IDENTITY_FIRST == 256


def test_actions_equal_the_kernels() -> None:
    """enum clawker_action."""
    assert [int(action) for action in (RouteAction.DENY, RouteAction.PROXY, RouteAction.PASS)] == [0, 1, 2]


def test_paths_are_read_only_where_something_depends_on_them() -> None:
    """An entry, or a default that denies."""
    assert not PathPolicy("r", (), default_allow=True).reads_paths
    assert PathPolicy("r", (), default_allow=False).reads_paths
    assert PathPolicy("r", (PathEntry("/a", allow=True),), default_allow=True).reads_paths
