"""What `--version` tells."""

from __future__ import annotations

import platform
from importlib.metadata import version

from clawker_cp import accel


def version_text() -> str:
    """
    Versions of everything that decides: ours, Python, libbpf, the kernel, and which hot paths run.
    """
    return (
        f"clawker-cp {version('clawker-cp')}\n"
        f"Python {platform.python_version()}, kernel {platform.release()}, "
        f"libbpf {accel.libbpf_version()}, hot paths: {accel.IMPLEMENTATION}"
    )
