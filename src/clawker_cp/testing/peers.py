"""
The real programs of other makers that tests run beside ours: `make peers` builds them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

BUILT = Path(__file__).resolve().parents[3] / "build" / "peers" / "bin"
WHY = "needs the real {name}: run `make peers`, or put it on PATH"


def peer(name: str) -> Path | None:
    """
    The path of `hydra`, `kratos`, `oathkeeper` or `coredns`; None where it is not built or installed.
    """
    built = BUILT / name
    if built.exists():
        return built
    found = shutil.which(name)
    return Path(found) if found else None
