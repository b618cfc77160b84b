"""Children hold nothing of ours beyond what they are given."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import uvloop

from clawker_cp.processes.descriptors import keep_descriptors

LIST = "import os; print(*(fd for fd in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + fd)))"


async def _open_in_a_child() -> set[int]:
    process = await asyncio.create_subprocess_exec(
        "/usr/bin/python3", "-c", LIST, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return set(map(int, said.split()))


def test_a_child_does_not_hold_what_libraries_left_inheritable() -> None:
    """The loop that serves leaves such a descriptor open in a child; after the call it is closed there."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        held = uvloop.run(_open_in_a_child())
        keep_descriptors()
        kept = uvloop.run(_open_in_a_child())
    finally:
        os.close(read)
        os.close(write)
    assert write in held and write not in kept


def test_the_limit_is_raised_as_far_as_it_may_be() -> None:
    """A process that began with a few may open as many files as its hard limit says, and knows what it had."""
    code = (
        "import resource; from clawker_cp.processes.descriptors import raise_limit\n"
        "print(raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    script = 'ulimit -n 4000; ulimit -S -n 200; exec "$@"'
    done = subprocess.run(["sh", "-c", script, "sh", sys.executable, "-c", code], capture_output=True, check=True)

    assert done.stdout.split() == [b"200", b"4000", b"4000"]
