"""Completion of `clawkerctl` in a real bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
eval "$(_CLAWKERCTL_COMPLETE=bash_source clawkerctl)"
complete -p clawkerctl >/dev/null
COMP_WORDS=(clawkerctl "$@"); COMP_CWORD=$#
_clawkerctl_completion clawkerctl
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.slow
def test_bash_completes_verbs_and_options() -> None:
    """The script that is documented, sourced; groups, verbs, options and values of options."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def completed(*words: str) -> set[str]:
        done = subprocess.run(
            ["bash", "-ec", SCRIPT, "bash", *words], env=environment, capture_output=True, text=True, timeout=60,
            check=True,
        )  # fmt: skip
        return set(done.stdout.split())

    assert {"firewall", "flows"} <= completed("f") and "status" not in completed("f")
    assert completed("firewall", "ro") == {"rotate-ca"}
    assert {"denied", "allowed"} <= completed("flows", "--verdict", "")
