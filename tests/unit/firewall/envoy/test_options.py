"""Tests of what is found on the machine."""

from __future__ import annotations

import pytest

from clawker_cp.errors import Unsupported
from clawker_cp.firewall.envoy.options import find_binary, find_roots
from clawker_cp.testing.proxy_config import OPTIONS


def test_a_binary_that_is_not_there_is_named() -> None:
    """`envoy.binary` with a bad path is an error that quotes it."""
    with pytest.raises(Unsupported, match="/nonexistent/envoy"):
        find_binary("/nonexistent/envoy")


def test_the_bundled_binary_and_the_system_roots_are_found() -> None:
    """The distribution's Envoy is there and can be run; so is a bundle of roots."""
    assert find_binary().stat().st_mode & 0o111
    assert find_roots().read_text().count("BEGIN CERTIFICATE") > 10


def test_paths_are_below_one_directory() -> None:
    """Everything Envoy reads and writes is in its directory."""
    for path in (OPTIONS.admin_socket, OPTIONS.access_log, OPTIONS.log, OPTIONS.bootstrap):
        assert path.parent == OPTIONS.directory
