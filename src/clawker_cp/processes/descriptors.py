"""What children must not inherit."""

from __future__ import annotations

import os
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
