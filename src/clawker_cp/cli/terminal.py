"""
The caller's terminal while a sandbox runs: a private pseudo-terminal, raw mode, resizing.

A sandbox never gets the caller's own terminal: with it, a process could push input into the
caller's shell (TIOCSTI). It gets the slave of a pseudo-terminal whose master is copied here.
Called by `cli.run`; knows nothing of sandboxes or servers.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import pty
import signal
import struct
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK_BYTES = 65536


def is_interactive() -> bool:
    """
    Whether both ends of the caller's session are terminals.
    """
    return sys.stdin.isatty() and sys.stdout.isatty()


class TerminalBridge:
    """
    Copies between the caller's terminal and a pseudo-terminal for the sandbox.

    Use as a context manager around the sandbox's life; `slave` is what the sandbox gets as its
    standard streams. The caller's terminal is restored on every way out.
    """

    def __init__(self, stdin_fd: int = 0, stdout_fd: int = 1) -> None:
        self._stdin = stdin_fd
        self._stdout = stdout_fd
        self._saved: list[int | list[bytes | int]] | None = None
        self._closed = asyncio.Event()
        self._pending_in = bytearray()
        self.master = -1
        self.slave = -1

    def open(self) -> None:
        """
        Make the pair with the caller's window size; raw mode starts with `start`.
        """
        self.master, self.slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.resize()

    def start(self) -> None:
        """
        Switch to raw mode and copy until the slave side is closed by its last holder.
        """
        self._saved = termios.tcgetattr(self._stdin)
        tty.setraw(self._stdin)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._stdin, self._from_caller)
        loop.add_reader(self.master, self._from_sandbox)
        loop.add_signal_handler(signal.SIGWINCH, self.resize)

    def release_slave(self) -> None:
        """
        Close our copy of the slave once the server holds it, so that its end is seen.
        """
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1

    def resize(self) -> None:
        """
        Give the sandbox the caller's present window size.
        """
        try:
            size = fcntl.ioctl(self._stdin, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise

    async def wait_drained(self, limit_s: float) -> None:
        """
        Wait until everything the sandbox wrote was copied, at most `limit_s` seconds.
        """
        try:
            async with asyncio.timeout(limit_s):
                await self._closed.wait()
        except TimeoutError:
            return

    def close(self) -> None:
        """
        Stop copying and give the terminal back; safe to call twice.
        """
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._stdin)
        if self.master >= 0:
            loop.remove_reader(self.master)
            loop.remove_writer(self.master)
            loop.remove_signal_handler(signal.SIGWINCH)
            os.close(self.master)
            self.master = -1
        self.release_slave()
        if self._saved is not None:
            termios.tcsetattr(self._stdin, termios.TCSADRAIN, self._saved)
            self._saved = None

    def _from_caller(self) -> None:
        data = os.read(self._stdin, _CHUNK_BYTES)
        if not data:
            asyncio.get_running_loop().remove_reader(self._stdin)
            return
        self._pending_in += data
        self._to_sandbox()

    def _to_sandbox(self) -> None:
        # The pseudo-terminal's input queue is small (4 KiB): a paste has to wait for its reader.
        loop = asyncio.get_running_loop()
        try:
            written = os.write(self.master, self._pending_in)
        except BlockingIOError:
            written = 0
        except OSError:
            self._pending_in.clear()
            return
        del self._pending_in[:written]
        if self._pending_in:
            loop.remove_reader(self._stdin)
            loop.add_writer(self.master, self._to_sandbox)
        else:
            loop.remove_writer(self.master)
            loop.add_reader(self._stdin, self._from_caller)

    def _from_sandbox(self) -> None:
        try:
            data = os.read(self.master, _CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: the last holder of the slave is gone
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self.master)
            self._closed.set()
            return
        _write_all(self._stdout, data)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def terminal_bridge() -> Iterator[TerminalBridge]:
    """
    Open a `TerminalBridge` and give the caller's terminal back on every way out.
    """
    bridge = TerminalBridge()
    bridge.open()
    try:
        yield bridge
    finally:
        bridge.close()
