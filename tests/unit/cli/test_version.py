"""What `--version` tells."""

from __future__ import annotations

import platform

from clawker_cp.cli.version import version_text


def test_everything_that_decides_is_named() -> None:
    """Ours, Python, the kernel, libbpf, and whether the hot paths are the compiled ones."""
    ours, rest = version_text().splitlines()
    assert ours.startswith("clawker-cp ")
    assert platform.release() in rest and "libbpf" in rest and rest.endswith(("fast", "pure"))
