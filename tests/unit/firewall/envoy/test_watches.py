"""Tests of the inotify limit."""

from __future__ import annotations

from pathlib import Path, PosixPath

import pytest

from clawker_cp.errors import CapacityExceeded
from clawker_cp.firewall.envoy.watches import ensure_watches


def test_a_limit_that_is_high_enough_is_left_alone(tmp_path: Path) -> None:
    """Nothing is written while the policies fit."""
    limit = tmp_path / "limit"
    limit.write_text("128\n")
    ensure_watches(10, limit)

    assert limit.read_text() == "128\n"


def test_a_limit_that_is_too_low_is_raised(tmp_path: Path) -> None:
    """A thousand policies get what they need."""
    limit = tmp_path / "limit"
    limit.write_text("128\n")
    ensure_watches(1001, limit)

    assert int(limit.read_text()) >= 4 * 1001


def test_where_it_cannot_be_raised_the_error_says_how(tmp_path: Path) -> None:
    """CAPACITY with the sysctl to set, instead of an Envoy that ends itself."""

    class Fixed(PosixPath):
        def write_text(self, *arguments: object, **more: object) -> int:
            raise PermissionError(1, "no")

    limit = Fixed(tmp_path / "limit")
    Path(limit).write_text("128\n")

    with pytest.raises(CapacityExceeded, match="inotify") as failure:
        ensure_watches(1001, limit)
    assert "sysctl fs.inotify.max_user_instances=" in (failure.value.hint or "")


def test_a_kernel_without_the_limit_is_fine(tmp_path: Path) -> None:
    """A missing file means no limit."""
    ensure_watches(1001, tmp_path / "missing")
