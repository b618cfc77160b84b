"""
A process that stops running without ending, as one does on a machine that is overloaded.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

LIMIT_S = 5.0
POLL_S = 0.002


def freeze(pid: int) -> None:
    """
    Stop a process and return once all of its threads stand: a signal reaches each only when it next runs, and until
    then it may still answer. SIGCONT lets it go on.
    """
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + LIMIT_S
    while not all(_stands(task) for task in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > until:
            raise TimeoutError(f"process {pid} still runs {LIMIT_S:g} s after SIGSTOP")
        time.sleep(POLL_S)


def _stands(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in {"T", "t"}
    except OSError:  # a thread that has ended
        return True
