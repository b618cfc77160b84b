"""
A child that outlives us: started detached, found again by pid and start time, ended on purpose.

Envoy carries connections that must survive the death of the control plane (ruling R22). Its pid,
start time and the digest of what it was started with stand in a file; the next start adopts a
process that matches and ends one that does not.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import structlog

from clawker_cp.errors import Unavailable
from clawker_cp.runtime.gate import WAIT, Gate

log = structlog.get_logger()

STOP_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Mark:
    """What identifies a process beyond its pid, which the kernel reuses."""

    pid: int
    started: int
    digest: str


class LastingProcess:
    """
    One detached child. `start` adopts or launches; `wait` returns at its end; `stop` ends it.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        mark: Path,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._command = list(command)
        self._mark_path = mark
        self._log_path = log_path
        self._log_start = 0
        self._environment = dict(environment or {})
        self._pidfd = -1
        self._pid = 0
        self._popen: subprocess.Popen[bytes] | None = None
        self._watch: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def running(self) -> bool:
        return self._pidfd >= 0 and start_time(self._pid) is not None

    async def start(self, digest: str) -> bool:
        """
        Adopt the process that runs with the same digest, else end it and launch a new one.

        True when adopted.
        """
        digest = hashlib.sha256((digest + "\0".join(self._command)).encode()).hexdigest()
        mark = _read_mark(self._mark_path)
        if mark is not None and start_time(mark.pid) == mark.started:
            if mark.digest == digest:
                self._hold(mark.pid, os.pidfd_open(mark.pid))
                log.info("processes_adopted", name=self.name, pid=mark.pid)
                return True
            await asyncio.to_thread(_end, mark.pid)
        self._launch(digest)
        return False

    async def wait(self) -> None:
        """
        Wait until the process has ended, or was let go; any number may wait.
        """
        if self._pidfd < 0:
            return
        if self._watch is None:
            # One for all who wait: a loop has one reader of a descriptor.
            loop = asyncio.get_running_loop()
            self._watch = (loop, asyncio.Event())
            loop.add_reader(self._pidfd, self._has_ended)
        await self._watch[1].wait()

    def _has_ended(self) -> None:
        if self._popen is not None:
            self._popen.poll()
        self._let_go()

    async def stop(self) -> None:
        """
        SIGTERM, and SIGKILL after `STOP_LIMIT_S`; forgets the mark. Fine when nothing runs.
        """
        if self._pidfd >= 0:
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_LIMIT_S):
                    await self.wait()
            except TimeoutError:
                self._signal(signal.SIGKILL)
                await self.wait()
        self._mark_path.unlink(missing_ok=True)

    def let_live(self) -> None:
        """
        Stop watching and leave the process running for the next start to adopt.
        """
        self._let_go()

    def last_output(self, limit_bytes: int = 4096) -> str:
        """
        The end of what the process has written since it was started here.
        """
        try:
            with self._log_path.open("rb") as output:
                # Less than it began with: the log was put aside meanwhile.
                size = os.fstat(output.fileno()).st_size
                begin = self._log_start if self._log_start <= size else 0
                output.seek(max(begin, size - limit_bytes))
                data = output.read()
        except OSError:
            return ""
        return data.decode("utf-8", "replace").strip()

    def _launch(self, digest: str) -> None:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with Gate() as gate:
            child = self._spawn(gate)
            pid = child.pid
            started = start_time(pid) or 0
            try:
                self._write_mark(_Mark(pid, started, digest))
                pidfd = os.pidfd_open(pid)
            except OSError as error:
                child.kill()
                child.wait()
                raise Unavailable(f"cannot keep hold of {self.name} ({self._mark_path}): {error.strerror}") from error
            # Only now: one that is not written down would run beside the next one, and after the last.
            gate.open()
        self._hold(pid, pidfd)
        self._popen = child
        log.info("processes_started", name=self.name, pid=pid)

    def _spawn(self, gate: Gate) -> subprocess.Popen[bytes]:
        if shutil.which(self._command[0]) is None:  # the shell would say so, and to the log alone
            raise Unavailable(f"cannot start {self.name} ({self._command[0]}): {os.strerror(errno.ENOENT)}")
        try:
            with self._log_path.open("ab") as output:
                self._log_start = output.tell()
                return subprocess.Popen(
                    ["/bin/sh", "-c", WAIT, "gate", str(gate.entry), *self._command],
                    pass_fds=[gate.entry],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    cwd="/",
                    env={
                        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
                        "HOME": "/nonexistent",
                        **self._environment,
                    },
                )
        except OSError as error:
            raise Unavailable(f"cannot start {self.name} ({self._command[0]}): {error.strerror}") from error

    def _hold(self, pid: int, pidfd: int) -> None:
        self._let_go()
        self._pidfd = pidfd
        self._pid = pid

    def _let_go(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch[0].remove_reader(self._pidfd)
            watch[1].set()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._popen is not None and self._popen.returncode is None:
            # Detached on purpose; without this the interpreter warns about a child it never waited for.
            self._popen.returncode = 0
        self._popen = None

    def _signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return

    def _write_mark(self, mark: _Mark) -> None:
        # By rename: half a mark would leave a process that nobody finds again.
        temporary = self._mark_path.with_name(f".clawker-{self._mark_path.name}.tmp")
        temporary.write_bytes(orjson.dumps({"pid": mark.pid, "started": mark.started, "digest": mark.digest}))
        temporary.replace(self._mark_path)


def end_left(mark: Path) -> bool:
    """
    End what an earlier start left running under this mark, for good; True when there was something. Blocks.
    """
    found = _read_mark(mark)
    mark.unlink(missing_ok=True)
    if found is None or start_time(found.pid) != found.started:
        return False
    _end(found.pid)
    return True


def start_time(pid: int) -> int | None:
    """
    When a living process started, in clock ticks since boot; None if it is gone or a zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def _read_mark(path: Path) -> _Mark | None:
    try:
        raw = orjson.loads(path.read_bytes())
        return _Mark(int(raw["pid"]), int(raw["started"]), str(raw["digest"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _end(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        # What follows binds the same ports: the old one has to be gone, which takes milliseconds.
        ended = select.poll()  # select() refuses descriptors above 1023
        ended.register(pidfd, select.POLLIN)
        ended.poll(STOP_LIMIT_S * 1000)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)
