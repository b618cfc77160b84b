"""
Process 1 of a container: the kernel gives it every orphan, and nobody else reaps those.

The loop's children are waited for one by one, so the server cannot also wait for whoever comes: it would take
the exit codes of its own children. Therefore process 1 stays behind as a parent that does nothing else.
Not needed, and not done, where the container shares the host's processes: there we are not process 1.
"""

from __future__ import annotations

import os
import signal

PASSED_ON = frozenset(
    (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
)  # fmt: skip
WATCHED = PASSED_ON | {signal.SIGCHLD}
FIRST = 1
FAILED = 125


def leave_first_process() -> None:
    """
    Return in a process that is not process 1. Call before the first thread and the first child.

    In process 1 this forks; the child returns, the parent never does: it passes signals on, reaps, and ends as
    the child ended (128 + signal for one that was killed), which ends the container.
    """
    if os.getpid() != FIRST:
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    code = FAILED
    try:
        code = _attend(child)
    finally:
        os._exit(code)  # what the child has imported and buffered is the child's to end


def _attend(child: int) -> int:
    while True:
        number = signal.sigwait(WATCHED)
        if number in PASSED_ON:
            os.kill(child, number)
            continue
        code = _reap(child)
        if code is not None:
            return code


def _reap(child: int) -> int | None:
    """Wait for everything that has ended; the exit code of `child` if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            ended = os.waitstatus_to_exitcode(status)
            found = ended if ended >= 0 else 128 - ended
