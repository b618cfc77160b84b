"""
Running the system's own tools (`ip`, `nft`, `bridge`) with a limit and a readable error.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

from clawker_cp.errors import DeadlineExceeded, Unavailable, Unsupported

LIMIT_S = 10.0
PACKAGES = {"ip": "iproute2", "bridge": "iproute2", "nft": "nftables", "bwrap": "bubblewrap", "setpriv": "util-linux"}
PACKAGES["nsenter"] = "util-linux"


def host_netns(pid: int = 1) -> Path | None:
    """
    The host's network namespace as a path; None when this thread is in it already.

    The host is process 1 as we see it: its init, or our own when we are a container that does not see the
    host's processes (ruling R1); the caller then misses what it looks for. Raises `Unavailable` when we may
    not look.
    """
    there = Path(f"/proc/{pid}/ns/net")
    try:
        if there.stat().st_ino == Path("/proc/thread-self/ns/net").stat().st_ino:
            return None
    except OSError as error:
        raise Unavailable(
            f"cannot see the network namespace of process {pid}: {error.strerror}",
            hint="run the container with pid: host and SYS_ADMIN",
        ) from error
    return there


def in_host(pid: int = 1) -> tuple[str, ...]:
    """
    What goes before a command so that it acts in the host's network namespace; nothing when we are there.
    """
    there = host_netns(pid)
    return () if there is None else ("nsenter", f"--net={there}", "--")


async def run(*command: str, text: str = "", check: bool = True) -> str:
    """
    Run a tool and return what it printed.

    Raises `Unsupported` when the tool is not installed, `Unavailable` with its own words when it
    fails (unless `check` is off), `DeadlineExceeded` after `LIMIT_S`.
    """
    if shutil.which(command[0]) is None:
        package = PACKAGES.get(command[0], command[0])
        raise Unsupported(
            f"{command[0]} is not installed",
            feature=command[0],
            needs=f"the Debian package {package}",
            hint=f"apt-get install {package}",
        )
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE if text else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            output, errors = await process.communicate(text.encode() or None)
    except BaseException as error:
        # Also when cancelled: it would wait for the rest of its input as long as we live.
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"{command[0]} did not end within {LIMIT_S:.0f} s") from error
        raise
    if check and process.returncode:
        words = errors.decode("utf-8", "replace").strip().splitlines()
        raise Unavailable(f"{' '.join(command[:4])}: {words[0] if words else f'exit {process.returncode}'}")
    return output.decode("utf-8", "replace")
