"""
Children that live and die with us: started, watched, told apart from crashes, ended in order.

Fail fast: the first unexpected exit of a child is reported on `crash_channel`, and the main loop
drains. A child that must survive us is `lasting.py`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from clawker_cp.errors import ClawkerError, Conflict, DeadlineExceeded, NotFound, Unavailable
from clawker_cp.processes.descriptors import keep_descriptors
from clawker_cp.processes.health import HealthCheck

OUTPUT_LINES = 50
LINE_LIMIT_BYTES = 64 << 10
KILL_LIMIT_S = 5.0


@dataclass(eq=False, slots=True)
class ManagedSubprocess:
    """
    One child.

    `exit_status` is None while it runs, negative for a signal. `output` holds its last lines.
    """

    name: str
    command: tuple[str, ...]
    pid: int = 0
    started_at: float = 0.0
    exit_status: int | None = None
    output: deque[str] = field(default_factory=lambda: deque(maxlen=OUTPUT_LINES))
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: bool = False
    _process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self._process is not None and self.exit_status is None

    def last_output(self, lines: int = 10) -> str:
        """Return the end of what it has written."""
        return "\n".join(list(self.output)[-lines:])


class SubprocessManager:
    """
    Starts and ends children in order. Use as `async with`, or call `shutdown`.

    The children's watchers live in a task group of this object: it has to be entered first.
    """

    def __init__(self, log: Any = None) -> None:
        self._log = log if log is not None else structlog.get_logger()
        self._children: dict[str, ManagedSubprocess] = {}
        self._group = asyncio.TaskGroup()
        self._expected = False
        self._reported = False
        # One error at most is ever put here: the first crash decides.
        self.crash_channel: asyncio.Queue[ClawkerError] = asyncio.Queue(maxsize=1)

    async def __aenter__(self) -> SubprocessManager:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *failure: Any) -> None:
        # Cancelled: whoever ends us has waited long enough.
        await self.shutdown(0.0 if failure and failure[0] is asyncio.CancelledError else KILL_LIMIT_S)
        await self._group.__aexit__(*failure)

    @property
    def children(self) -> Mapping[str, ManagedSubprocess]:
        """All children by name, ended ones included."""
        return dict(self._children)

    async def start(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> ManagedSubprocess:
        """
        Launch and watch a child; its output goes line by line to our standard error.

        The kernel kills it when we die, however that happens: the next start finds its ports free.
        Raises `Conflict` for a name that runs, `Unavailable` if it cannot be started.
        """
        known = self._children.get(name)
        if known is not None and known.running:
            raise Conflict(f"a child named {name} runs already")
        if self._expected:
            raise Unavailable(f"{name} is not started: children are being ended", code="QUEUE_CLOSED")
        keep_descriptors()
        try:
            process = await asyncio.create_subprocess_exec(
                *_dying_with_us(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=None if env is None else dict(env),
                cwd=cwd,
                limit=LINE_LIMIT_BYTES,
            )
        except OSError as error:
            raise Unavailable(f"cannot start {name} ({command[0]}): {error.strerror}") from error
        child = ManagedSubprocess(name, tuple(command), process.pid, time.time(), _process=process)
        self._children.pop(name, None)
        self._children[name] = child
        self._group.create_task(self._watch(child, process), name=f"child-{name}")
        self._log.info("processes_started", name=name, pid=process.pid)
        return child

    async def wait_healthy(self, name: str, check: HealthCheck) -> None:
        """
        Return when the check succeeds.

        Raises `Unavailable` at once with the child's last output if it ends first,
        `DeadlineExceeded` at the check's timeout, `NotFound` for a name nobody started.
        """
        child = self._child(name)
        async with asyncio.TaskGroup() as group:
            polling = group.create_task(_failure_of(check.wait()))
            watching = group.create_task(child.ended.wait())
            await asyncio.wait((polling, watching), return_when=asyncio.FIRST_COMPLETED)
            polled = polling.done()
            polling.cancel()
            watching.cancel()
        if not polled:
            raise Unavailable(
                f"{name} ended with {_status(child.exit_status)} before it was healthy: {child.last_output()}"
            )
        failure = polling.result()
        if isinstance(failure, TimeoutError):
            raise DeadlineExceeded(
                f"{name} was not healthy within {check.timeout:g} s ({check.url}): {child.last_output()}"
            ) from failure
        if failure is not None:
            raise failure

    async def stop(self, name: str, timeout: float) -> None:
        """
        End one child on purpose: SIGTERM, up to `timeout` seconds, SIGKILL. Its name may be started again.

        Raises `NotFound` for a name nobody started.
        """
        child = self._child(name)
        child.leaving = True
        await self._end(child, timeout)

    def begin_shutdown(self) -> None:
        """From here on exits are expected, not crashes."""
        self._expected = True

    def forward_signal(self, number: int) -> None:
        """Send a signal to all children that live."""
        for child in self._children.values():
            _signal(child, number)

    async def shutdown(self, timeout: float) -> None:
        """End all children, the last started first: SIGTERM, up to `timeout` seconds each, SIGKILL."""
        self.begin_shutdown()
        for child in reversed(list(self._children.values())):
            await self._end(child, timeout)

    async def _end(self, child: ManagedSubprocess, timeout: float) -> None:
        if not child.running:
            return
        _signal(child, signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout):
                await child.ended.wait()
        except TimeoutError:
            self._log.warning("processes_killed", name=child.name, pid=child.pid)
            _signal(child, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_LIMIT_S):
                    await child.ended.wait()

    def _child(self, name: str) -> ManagedSubprocess:
        child = self._children.get(name)
        if child is None:
            raise NotFound(f"no child named {name} was started")
        return child

    async def _watch(self, child: ManagedSubprocess, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async with asyncio.TaskGroup() as group:
            copying = group.create_task(self._copy(child, process.stdout))
            child.exit_status = await process.wait()
            # A grandchild may hold the pipe open; what the child itself wrote is there by now.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await asyncio.shield(copying)
            copying.cancel()
        child.ended.set()
        if self._expected or child.leaving:
            self._log.info("processes_ended", name=child.name, status=child.exit_status)
            return
        self._log.error("cp_subprocess_crashed", name=child.name, status=child.exit_status, output=child.last_output())
        if not self._reported:
            self._reported = True
            self.crash_channel.put_nowait(
                Unavailable(f"{child.name} ended with {_status(child.exit_status)}: {child.last_output()}")
            )

    async def _copy(self, child: ManagedSubprocess, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the limit: what was read is dropped
                child.output.append("(a line too long to show)")
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            child.output.append(text)
            sys.stderr.write(f"{child.name}: {text}\n")


def _dying_with_us(command: Sequence[str]) -> Sequence[str]:
    """The command behind util-linux's setpriv, which sets PR_SET_PDEATHSIG (prctl(2)) and execs it."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--", *command] if setpriv and shutil.which(command[0]) else command


async def _failure_of(work: Coroutine[Any, Any, None]) -> Exception | None:
    try:
        await work
    except (TimeoutError, OSError, ClawkerError) as failure:
        return failure
    return None


def _signal(child: ManagedSubprocess, number: int) -> None:
    if child.running and child._process is not None:
        with contextlib.suppress(ProcessLookupError):
            child._process.send_signal(number)


def _status(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
    return f"status {status}"
