"""Process 1 of a container, in a process namespace of the test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clawker_cp.processes.first import leave_first_process

IN_ITS_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c"]
LIMIT_S = 20.0

ORPHANS = """
import os, sys, time
from clawker_cp.processes.first import leave_first_process
leave_first_process()
assert os.getpid() != 1
def left():
    return len([one for one in os.listdir('/proc') if one.isdecimal()])  # a zombie has its entry, too
before = left()
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)  # its parent is gone, or goes: process 1 inherits it
        os._exit(0)
for _ in range(20):
    os.wait()
until = time.monotonic() + 10
while left() > before and time.monotonic() < until:
    os.sched_yield()
print(left() - before)
sys.exit(7)
"""

SIGNALS = """
import signal, sys
from clawker_cp.processes.first import leave_first_process
leave_first_process()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print('ready', flush=True)
number = signal.sigwait({signal.SIGTERM})
sys.exit(40 + number)
"""

KILLED = """
import os, signal
from clawker_cp.processes.first import leave_first_process
leave_first_process()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.root
@pytest.mark.slow
def test_orphans_are_reaped_and_the_exit_code_is_ours() -> None:
    """Twenty orphans leave no zombie behind, and the container ends with the code of the server."""
    done = subprocess.run([*IN_ITS_NAMESPACE, ORPHANS], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.stdout.strip(), done.returncode, done.stderr) == ("0", 7, "")


@pytest.mark.root
@pytest.mark.slow
def test_signals_reach_the_server() -> None:
    """A SIGTERM for process 1 arrives at the server, whose answer to it decides the exit code."""
    with subprocess.Popen([*IN_ITS_NAMESPACE, SIGNALS], stdout=subprocess.PIPE, text=True) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline() == "ready\n"
        first = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
        os.kill(first, signal.SIGTERM)
        assert outer.wait(LIMIT_S) == 40 + signal.SIGTERM


@pytest.mark.root
@pytest.mark.slow
def test_a_killed_server_ends_the_container() -> None:
    """The code says by which signal, as a shell does."""
    done = subprocess.run([*IN_ITS_NAMESPACE, KILLED], capture_output=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 128 + signal.SIGKILL


def test_elsewhere_nothing_is_forked() -> None:
    """Who is not process 1 goes on in the same process."""
    children = Path("/proc/self/task").joinpath(str(os.getpid()), "children")
    before = children.read_text()
    leave_first_process()
    assert children.read_text() == before
