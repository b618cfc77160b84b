"""
The process of a sandbox: starting it, finding its command, and its exit code from the status file.

`bwrap` writes what it knows into a file of the sandbox's directory, so the exit code survives the
control plane. Nothing here decides when a process may start.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import orjson

from clawker_cp.engines.base import Sandbox
from clawker_cp.engines.host.bubble import command_line, sandbox_arguments
from clawker_cp.engines.host.cgroups import read_mounts
from clawker_cp.engines.host.seccomp import filter_program
from clawker_cp.errors import NotFound, Unavailable
from clawker_cp.runtime.gate import Gate

STATUS_FILE = "status"
START_LIMIT_S = 10.0
POLL_S = 0.005
DESCRIPTOR_PAUSE_S = 0.1
_NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
UNKNOWN_EXIT = 137  # killed before it could say
OWN_FAILURE = 125  # ruling R40: the sandbox could not be set up
# Signals that a terminal or a shell sends to a whole job; others are for the command alone.
GROUP_SIGNALS = frozenset(
    {signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP, signal.SIGCONT}
)


def launch(
    sandbox: Sandbox,
    streams: tuple[int, int, int],
    gate: Gate,
    *,
    cgroups: Sequence[Path],
    netns: Path,
    masked: Sequence[Path],
    ca_dir: Path | None,
    open_files: int,
) -> subprocess.Popen[bytes]:
    """
    Start the stages of a sandbox on the given streams, up to the gate; returns at once. Blocks for the fork.
    """
    status = os.open(sandbox.directory / STATUS_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    opened = [status]
    try:
        arguments = sandbox_arguments(sandbox, masked=masked, ca_dir=ca_dir, mounts=read_mounts())
        args = _memory_file("arguments", b"".join(os.fsencode(word) + b"\0" for word in arguments))
        opened.append(args)
        seccomp = -1
        if sandbox.spec.seccomp:
            seccomp = _memory_file("filter", filter_program())
            opened.append(seccomp)
        line = command_line(
            sandbox,
            cgroups,
            netns,
            gate_fd=gate.entry,
            args_fd=args,
            status_fd=status,
            seccomp_fd=seccomp,
            open_files=open_files,
        )
        return subprocess.Popen(
            line,
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            pass_fds=[gate.entry, *opened],
            start_new_session=True,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
    except OSError as error:
        raise Unavailable(f"cannot start a sandbox: {error.strerror}") from error
    finally:
        for fd in opened:
            os.close(fd)


def _memory_file(name: str, data: bytes) -> int:
    fd = os.memfd_create(name, 0)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def status(sandbox: Sandbox) -> dict[str, int]:
    """
    What `bwrap` has said so far: `child-pid`, later `exit-code`.
    """
    known: dict[str, int] = {}
    try:
        data = (sandbox.directory / STATUS_FILE).read_bytes()
    except OSError:
        return known
    for line in data.splitlines():
        try:
            said = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(said, dict):
            known |= {key: value for key, value in said.items() if isinstance(value, int)}
    return known


def began(sandbox: Sandbox) -> bool:
    """
    Whether the command can have run: `bwrap` says `child-pid` before it lets the child go on.
    """
    return "child-pid" in status(sandbox)


async def decided(sandbox: Sandbox) -> None:
    """
    Wait until the stages of a sandbox have come to its command or have ended, at most `START_LIMIT_S`.
    """
    until = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until:
        if began(sandbox) or not runs(sandbox):
            break
        await asyncio.sleep(POLL_S)


def exit_code(sandbox: Sandbox, returned: int | None) -> int:
    """
    The command's exit code: from the status file, else from the process itself.

    Without either it was killed from outside; a process that failed before the command is ours.
    """
    code = status(sandbox).get("exit-code")
    if code is not None:
        return code
    if returned is not None:
        return 128 - returned if returned < 0 else OWN_FAILURE
    return UNKNOWN_EXIT


def start_time(pid: int) -> int:
    """
    When a process started, in clock ticks since boot; 0 when it is gone or only waits to be reaped.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in {"Z", "X"} else int(fields[19])


def runs(sandbox: Sandbox) -> bool:
    """
    Whether the process that was started for a sandbox, and tells its exit code, still lives.
    """
    return bool(sandbox.pid) and start_time(sandbox.pid) == sandbox.started != 0


async def wait_gone(pid: int, started: int = 0) -> None:
    """
    Wait until a process that need not be our child has ended; `started` tells it from a later one.
    """
    while True:
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) or error.errno not in _NO_DESCRIPTOR:
                return
            # That says nothing about the process.
            await asyncio.sleep(DESCRIPTOR_PAUSE_S)
        else:
            break
    if started and start_time(pid) not in {0, started}:
        os.close(pidfd)
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
        if "exit-code" in known or not start_time(sandbox.pid):
            break
        init = known.get("child-pid")
        if init:
            children = _children(init)
            # Before it leads a session it is still one of our stages.
            if children and os.getpgid(children[0]) == children[0]:
                return children[0]
            if not children and not start_time(init):
                break
        await asyncio.sleep(POLL_S)
    raise NotFound(f"sandbox {sandbox.id[:12]} has no running command")


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def send(pid: int, number: int) -> None:
    """
    Signal a command: its whole job where a terminal would; gone is fine.
    """
    try:
        if number in GROUP_SIGNALS:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except (ProcessLookupError, OSError):
        return


def kill_init(sandbox: Sandbox) -> None:
    """
    SIGKILL process 1 of the sandbox, with which the kernel ends all others; bwrap then tells the code.
    """
    init = status(sandbox).get("child-pid")
    if init and sandbox.pid and start_time(init) and _parent(init) == sandbox.pid:
        send(init, signal.SIGKILL)


def kill_stage(sandbox: Sandbox) -> None:
    """
    SIGKILL the process that was started for a sandbox, before or after it became bwrap.
    """
    if runs(sandbox):
        send(sandbox.pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
