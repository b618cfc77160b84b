"""Which hot paths run: compiled unless plain ones are asked for, never silently."""

from __future__ import annotations

import os
import subprocess
import sys


def implementation(code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"{code}\nfrom clawker_cp import accel; print(accel.IMPLEMENTATION)"
    clean = {name: value for name, value in os.environ.items() if name != "CLAWKER_CP_NO_EXTENSIONS"}
    return subprocess.run(
        [sys.executable, "-c", script], env={**clean, **environment}, capture_output=True, text=True, check=False
    )


def test_compiled_is_the_default_and_plain_is_asked_for() -> None:
    """Only the one variable with the value 1 selects the twins."""
    assert implementation().stdout == "fast\n"
    assert implementation(CLAWKER_CP_NO_EXTENSIONS="1").stdout == "pure\n"
    assert implementation(CLAWKER_CP_NO_EXTENSIONS="0").stdout == "fast\n"


def test_a_broken_build_stops_the_program() -> None:
    """Without a compiled module nothing runs, and the message says how to build it."""
    done = implementation("import sys; sys.modules['clawker_cp._fast.names'] = None")

    assert done.returncode == 1
    assert "pip install -e ." in done.stderr and "CLAWKER_CP_NO_EXTENSIONS=1" in done.stderr
