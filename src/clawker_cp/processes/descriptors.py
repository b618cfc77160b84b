"""How many descriptors we may have, and which of them children must not inherit."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path


def keep_descriptors() -> None:
    """
    Mark every open descriptor but the standard three as closed on exec; call it right before a child is started.

    uvloop leaves open in children what is inheritable, whatever `close_fds` says, and libraries open some that are
    (gRPC's listeners): a child that outlives its cause would hold them.
    """
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if fd > 2:
            with suppress(OSError):  # the listing's own is closed by now
                os.set_inheritable(fd, False)


def raise_limit() -> int:
    """
    Let this process open as many files as it is allowed to; returns what it had, which is for its sandboxes.

    A login's or a service's 1024 is what a few agents can take with connections to the gate and the control
    plane. Programs of agents may not bear more, as select(2) does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft
