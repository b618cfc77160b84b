"""
The process of a sandbox: starting it, finding its command, and its exit code from the status file.

`bwrap` writes what it knows into a file of the sandbox's directory, so the exit code survives the
control plane. Nothing here decides when a process may start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import orjson

from clawker_cp.engines.base import Sandbox
from clawker_cp.engines.host.bubble import command_line
from clawker_cp.engines.host.seccomp import socket_filter
from clawker_cp.errors import NotFound, Unavailable

STATUS_FILE = "status"
START_LIMIT_S = 10.0
UNKNOWN_EXIT = 137  # killed before it could say


def launch(
    sandbox: Sandbox, streams: tuple[int, int, int], *, masked: Sequence[Path], ca_dir: Path | None
) -> subprocess.Popen[bytes]:
    """
    Start the stages of a sandbox on the given streams; returns at once.
    """
    status = os.open(sandbox.directory / STATUS_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    seccomp = -1
    try:
        inherited = [status]
        if sandbox.spec.seccomp:
            seccomp = os.memfd_create("seccomp", 0)
            os.write(seccomp, socket_filter())
            os.lseek(seccomp, 0, os.SEEK_SET)
            inherited.append(seccomp)
        line = command_line(sandbox, masked=masked, ca_dir=ca_dir, status_fd=status, seccomp_fd=seccomp)
        return subprocess.Popen(
            line,
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            pass_fds=inherited,
            start_new_session=not sandbox.spec.tty,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
    except OSError as error:
        raise Unavailable(f"cannot start a sandbox: {error.strerror}") from error
    finally:
        os.close(status)
        if seccomp >= 0:
            os.close(seccomp)


def status(sandbox: Sandbox) -> dict[str, int]:
    """
    What `bwrap` has said so far: `child-pid`, later `exit-code`.
    """
    known: dict[str, int] = {}
    try:
        text = (sandbox.directory / STATUS_FILE).read_text()
    except OSError:
        return known
    for line in text.splitlines():
        try:
            known.update(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue
    return known


def exit_code(sandbox: Sandbox, returned: int | None) -> int:
    """
    The command's exit code: from the status file, else from the process itself.
    """
    code = status(sandbox).get("exit-code")
    if code is not None:
        return code
    if returned is not None:
        return 128 - returned if returned < 0 else returned
    return UNKNOWN_EXIT


async def wait_gone(pid: int) -> None:
    """
    Wait until a process that need not be our child has ended.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def command_pid(sandbox: Sandbox) -> int:
    """
    Pid, in our namespace, of the agent's command (the first child of the sandbox's init).

    Raises `NotFound` when the sandbox has ended or did not get that far within `START_LIMIT_S`.
    """
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until:
        known = status(sandbox)
        if "exit-code" in known:
            break
        init = known.get("child-pid")
        if init:
            children = _children(init)
            if children:
                return children[0]
            if not Path(f"/proc/{init}").exists():
                break
        await asyncio.sleep(0.01)
    raise NotFound(f"sandbox {sandbox.id[:12]} has no running command")


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def send(pid: int, number: int) -> None:
    """
    Signal a process; gone is fine.
    """
    try:
        os.kill(pid, signal.Signals(number))
    except (ProcessLookupError, ValueError):
        return
