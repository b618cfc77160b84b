"""
The far ends of a sandbox's standard streams, for sandboxes that nobody's terminal is connected to.

A terminal whose master is closed hangs up, and a pipe without a reader kills its writer: so a process that
does nothing holds these ends too, and a control plane that was killed gets them back from it
(pidfd_getfd(2), Linux 5.6). Used on the loop only.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import termios
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import orjson
import structlog

from clawker_cp.engines.host.process import start_time
from clawker_cp.errors import Conflict, InvalidInput, Unavailable

log = structlog.get_logger()

CHUNK_BYTES = 32 * 1024  # contract 2.4: output chunks are at most this long
BACKLOG_BYTES = 256 * 1024
RECORD = "console.json"
_HOLDER = ("sleep", "infinity")
_PIDFD_GETFD = 438  # the same number on every architecture
MAX_WINDOW = 0xFFFF
END_LIMIT_S = 1.0


class Console:
    """
    Our ends of one sandbox's streams. `open` makes them, `reopen` gets them back after a restart.

    While nobody is attached output goes on being read; the last 256 KiB are kept for who attaches next.
    While somebody is, output waits for him: the command blocks, nothing is lost.
    """

    def __init__(self, directory: Path, *, tty: bool, read_fd: int, write_fd: int, holder: int, started: int) -> None:
        self._directory = directory
        self._tty = tty
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._holder = holder
        self._started = started
        self._process: subprocess.Popen[bytes] | None = None
        self._backlog: deque[bytes] = deque()
        self._held = 0
        self._ready = asyncio.Event()
        self._ended = False
        self._reading = False
        self._attached = False
        self.lost_bytes = 0

    @classmethod
    def open(cls, directory: Path, *, tty: bool) -> tuple[Console, tuple[int, int, int]]:
        """
        Make the streams; returns the console and what the command gets, which the caller closes.
        """
        made: list[int] = []

        def copy(fd: int) -> int:
            made.append(os.dup(fd))
            return made[-1]

        try:
            if tty:
                made += pty.openpty()
                read_fd, write_fd = made[0], made[0]
                streams = (made[1], copy(made[1]), copy(made[1]))
            else:
                made += os.pipe()
                made += os.pipe()
                stdin, write_fd, read_fd, stdout = made
                streams = (stdin, stdout, copy(stdout))
            process = subprocess.Popen(
                _HOLDER, pass_fds=sorted({read_fd, write_fd}), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True, cwd="/", env={"PATH": os.defpath},
            )  # fmt: skip
        except OSError as error:
            for fd in made:
                os.close(fd)
            raise Unavailable(f"the sandbox's streams cannot be kept: {error.strerror}") from error
        started = start_time(process.pid)
        console = cls(directory, tty=tty, read_fd=read_fd, write_fd=write_fd, holder=process.pid, started=started)
        console._process = process
        record = {"tty": tty, "read": read_fd, "write": write_fd, "holder": process.pid, "started": started}
        try:
            (directory / RECORD).write_bytes(orjson.dumps(record))
        except OSError as error:
            for fd in streams:
                os.close(fd)
            console.close()
            raise Unavailable(f"cannot write {directory / RECORD}: {error.strerror}") from error
        return console, streams

    @classmethod
    def reopen(cls, directory: Path) -> Console | None:
        """
        Get the ends back from the process that holds them; None if there is none, or not that one any more.
        """
        try:
            raw = orjson.loads((directory / RECORD).read_bytes())
            holder, started = int(raw["holder"]), int(raw["started"])
            if start_time(holder) != started:
                return None
            pidfd = os.pidfd_open(holder)
            try:
                read_fd = _take_fd(pidfd, int(raw["read"]))
                if raw["tty"]:
                    write_fd = read_fd
                else:  # without an input of its own: that was closed before
                    write_fd = _take_fd(pidfd, int(raw["write"])) if raw["write"] != raw["read"] else -1
            finally:
                os.close(pidfd)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("engines_console_lost", directory=str(directory), error=str(error))
            return None
        return cls(directory, tty=bool(raw["tty"]), read_fd=read_fd, write_fd=write_fd, holder=holder, started=started)

    @property
    def attached(self) -> bool:
        """Whether somebody follows the output now."""
        return self._attached

    def start(self) -> None:
        """
        Begin to read the output.
        """
        os.set_blocking(self._read_fd, False)
        if self._write_fd >= 0:
            os.set_blocking(self._write_fd, False)
        self._resume()

    @asynccontextmanager
    async def attach(self) -> AsyncIterator[Attachment]:
        """
        Follow the output from what is kept on, and write to the input. One at a time: else `Conflict`.
        """
        if self._attached:
            raise Conflict("somebody is attached to this sandbox already")
        self._attached = True
        try:
            yield Attachment(self)
        finally:
            self._attached = False
            self._resume()

    async def wait_ended(self) -> None:
        """
        Wait until the output has ended and all of it was read; whoever is attached sets the pace.
        """
        while not self._ended:
            self._ready.clear()
            await self._ready.wait()

    def close(self) -> None:
        """
        Give everything back and end the holder: the sandbox is gone. Safe to call twice.
        """
        self._pause()
        for fd in {self._read_fd, self._write_fd}:
            if fd >= 0:
                os.close(fd)
        self._read_fd = self._write_fd = -1
        _end_holder(self._holder, self._started, self._process)
        self._process = None
        self._holder = 0
        self._finish()

    def leave(self) -> None:
        """
        Give our copies back and let the holder keep its own, for the next control plane.
        """
        self._pause()
        for fd in {self._read_fd, self._write_fd}:
            if fd >= 0:
                os.close(fd)
        self._read_fd = self._write_fd = -1
        if self._process is not None:
            self._process.returncode = 0  # it outlives us on purpose
            self._process = None

    # -- for the attachment --------------------------------------------------------------------

    async def next_output(self) -> bytes:
        """Wait for output; b"" = it has ended."""
        while not self._backlog:
            if self._ended:
                return b""
            self._ready.clear()
            self._resume()
            await self._ready.wait()
        chunk = self._backlog.popleft()
        self._held -= len(chunk)
        return chunk

    async def write_input(self, data: bytes) -> None:
        """Write all of it, waiting while the command does not read; what it no longer takes is dropped."""
        view = memoryview(data)
        while view and self._write_fd >= 0:
            try:
                view = view[os.write(self._write_fd, view) :]
            except BlockingIOError:
                await self._wait_writable()
            except OSError as error:
                if error.errno not in {errno.EPIPE, errno.EIO}:
                    raise
                return

    def close_input(self) -> None:
        """End the command's input: the pipe's end closes everywhere, a terminal gets its end-of-file character."""
        if self._write_fd < 0:
            return
        if self._tty:
            with suppress(OSError):
                os.write(self._write_fd, b"\x04")
            return
        os.close(self._write_fd)
        self._write_fd = -1
        self._replace_holder()

    def resize(self, rows: int, columns: int) -> None:
        """Tell a terminal its size; nothing to do for pipes."""
        if not (0 < rows <= MAX_WINDOW and 0 < columns <= MAX_WINDOW):
            raise InvalidInput(f"resize: {rows} rows and {columns} columns is no window")
        if self._tty and self._read_fd >= 0:
            fcntl.ioctl(self._read_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    # -- inner ---------------------------------------------------------------------------------

    async def _wait_writable(self) -> None:
        # A copy to wait on: the reader side may watch the same descriptor of a terminal.
        loop, writable, fd = asyncio.get_running_loop(), asyncio.Event(), os.dup(self._write_fd)
        loop.add_writer(fd, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(fd)
            os.close(fd)

    def _replace_holder(self) -> None:
        """Let a new holder keep the output's end alone, so that the input is closed for good."""
        process = subprocess.Popen(
            _HOLDER, pass_fds=[self._read_fd], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, cwd="/", env={"PATH": os.defpath},
        )  # fmt: skip
        old, old_started, old_process = self._holder, self._started, self._process
        self._holder, self._started, self._process = process.pid, start_time(process.pid), process
        record = {"tty": False, "read": self._read_fd, "write": self._read_fd, "holder": self._holder,
                  "started": self._started}  # fmt: skip
        (self._directory / RECORD).write_bytes(orjson.dumps(record))
        _end_holder(old, old_started, old_process)

    def _resume(self) -> None:
        if self._reading or self._ended or self._read_fd < 0:
            return
        asyncio.get_running_loop().add_reader(self._read_fd, self._on_readable)
        self._reading = True

    def _pause(self) -> None:
        if self._reading:
            asyncio.get_running_loop().remove_reader(self._read_fd)
            self._reading = False

    def _on_readable(self) -> None:
        try:
            chunk = os.read(self._read_fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""  # EIO: the last process has closed the terminal
        if not chunk:
            self._pause()
            self._finish()
            return
        self._backlog.append(chunk)
        self._held += len(chunk)
        self._ready.set()
        if self._attached:
            if self._held >= BACKLOG_BYTES:
                self._pause()
            return
        while self._held > BACKLOG_BYTES:
            gone = self._backlog.popleft()
            self._held -= len(gone)
            self.lost_bytes += len(gone)

    def _finish(self) -> None:
        self._ended = True
        self._ready.set()


def discard(directory: Path) -> None:
    """
    Remove the directory of a sandbox that is gone, and end the process that holds its streams if there is one.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):  # it was a client's, or never had any
        raw = orjson.loads((directory / RECORD).read_bytes())
        _end_holder(int(raw["holder"]), int(raw["started"]), None)
    shutil.rmtree(directory, ignore_errors=True)


class Attachment:
    """What whoever is attached can do."""

    def __init__(self, console: Console) -> None:
        self._console = console

    async def read(self) -> bytes:
        """Wait for the next piece of output, at most 32 KiB; b"" = it has ended."""
        return await self._console.next_output()

    async def write(self, data: bytes) -> None:
        """Write to the command's input."""
        await self._console.write_input(data)

    def close_input(self) -> None:
        """End the command's input."""
        self._console.close_input()

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of a terminal. Raises `InvalidInput`."""
        self._console.resize(rows, columns)


def _end_holder(pid: int, started: int, child: subprocess.Popen[bytes] | None) -> None:
    """Kill a holder, ours or an earlier server's, and wait for its end: a matter of a millisecond."""
    if pid and start_time(pid) == started:
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            ended = select.poll()  # select() refuses descriptors above 1023, of which a busy server has many
            ended.register(pidfd, select.POLLIN)
            ended.poll(END_LIMIT_S * 1000)
            os.close(pidfd)
    if child is not None:
        child.wait()


def _take_fd(pidfd: int, number: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "pidfd_getfd")
    os.set_inheritable(fd, False)
    return fd
