"""
A process whose file descriptors are used up, or whose next one is beyond what select(2) takes.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

SELECT_TAKES = 1024


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """
    Let every call that wants a descriptor fail with EMFILE; what is open stays usable.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)  # the kernel gives out the lowest free number
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def beyond_select() -> Iterator[None]:
    """
    Let every new descriptor have a number that select(2) refuses.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2 * SELECT_TAKES), hard), hard))
    held = [os.dup(0)]
    try:
        while held[-1] < SELECT_TAKES:
            held.append(os.dup(0))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
