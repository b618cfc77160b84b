"""
Programs for benchmarks of the kernel side: `connect_loop.c` as a process in a cgroup, in the agents' network.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_START = 'echo $$ > "$1/cgroup.procs" && exec nsenter --net="/proc/$2/ns/net" -- "$3"'


def compiled(directory: Path) -> Path:
    """
    The program, compiled into a directory.
    """
    program = directory / "connect_loop"
    subprocess.run(["cc", "-O2", "-o", program, Path(__file__).with_name("connect_loop.c")], check=True)
    return program


class Loop:
    """`connect_loop` in a cgroup, in the agents' network."""

    def __init__(self, program: Path, cgroup: Path, netns_pid: int) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", _START, "loop", str(cgroup), str(netns_pid), str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, kind: str, addr: str, port: int, times: int, *, per_second: int = 0) -> tuple[float, int]:
        """
        Nanoseconds a call, and how many of them failed; evenly paced if `per_second` is given.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{kind} {addr} {port} {times} {per_second}\n")
        self._process.stdin.flush()
        took, failed = self._process.stdout.readline().split()
        return float(took), int(failed)

    def close(self) -> None:
        """
        End it.
        """
        self._process.kill()
        self._process.communicate()
