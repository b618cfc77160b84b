"""Bases out of this machine's packages: what belongs in, and that nothing else does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))

from image_base import STATUS, closure, shipped, stanzas  # noqa: E402 - lies in tools/, beside the package

TEXT = """Package: app
Status: install ok installed
Architecture: amd64
Depends: lib (>= 1), shell | other-shell, virtual
Pre-Depends: pre:any

Package: lib
Status: install ok installed
Depends: lib-data

Package: lib-data
Status: install ok installed

Package: other-shell
Status: install ok installed

Package: real
Status: install ok installed
Provides: virtual (= 1), second

Package: pre
Status: install ok installed

Package: core
Essential: yes
Status: install ok installed

Package: unrelated
Status: install ok installed

Package: removed
Status: deinstall ok config-files
"""


def test_what_is_needed_is_in() -> None:
    """Dependencies of every kind, the alternative that is here, who provides it, and the essential packages."""
    assert closure(stanzas(TEXT), ["app"]) == {"app", "lib", "lib-data", "other-shell", "real", "pre", "core"}


@pytest.mark.parametrize("missing", ["removed", "never-heard-of"])
def test_what_is_not_installed_is_named(missing: str) -> None:
    """A base that lacks something would fail much later."""
    with pytest.raises(LookupError, match=missing):
        closure(stanzas(TEXT), [missing])


@pytest.mark.skipif(not STATUS.exists(), reason="packages are Debian's")
def test_only_what_packages_shipped_is_in() -> None:
    """A file that somebody changed, documentation and what no package brought stay out."""
    installed = stanzas(STATUS.read_text())
    files = {str(path) for path in shipped(closure(installed, ["iproute2"]), installed)}
    assert "/usr/bin/ip" in files or "/usr/sbin/ip" in files
    assert not [one for one in files if one.startswith(("/usr/share/doc/", "/usr/share/man/", "/root/", "/home/"))]
    assert not files & {"/etc/pip.conf", "/etc/hostname", "/etc/resolv.conf", "/etc/shadow", "/etc/apt/sources.list"}
