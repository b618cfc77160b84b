"""
The caller's own standard streams while attached to a sandbox: read without blocking, raw if asked, restored after.
"""

from __future__ import annotations

import asyncio
import os
import sys
import termios
import tty
from types import TracebackType
from typing import Any, Self

CHUNK_BYTES = 32 * 1024


class CallerStreams:
    """
    Standard input and output of this process. A context manager: the terminal is restored on every way out.
    """

    def __init__(self, *, raw: bool, stdin_fd: int = 0, stdout_fd: int = 1) -> None:
        self._raw = raw and os.isatty(stdin_fd)
        self._stdin = stdin_fd
        self._stdout = stdout_fd
        self._saved: list[Any] | None = None

    def __enter__(self) -> Self:
        if self._raw:
            self._saved = termios.tcgetattr(self._stdin)
            tty.setraw(self._stdin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is not None:
            termios.tcsetattr(self._stdin, termios.TCSADRAIN, self._saved)
            self._saved = None

    async def read(self) -> bytes:
        """
        The next piece of input; b"" at its end.
        """
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        try:
            loop.add_reader(self._stdin, readable.set)
        except (PermissionError, OSError):
            # A regular file, or nothing at all, is always readable and cannot be watched.
            return await asyncio.to_thread(os.read, self._stdin, CHUNK_BYTES)
        try:
            await readable.wait()
            return os.read(self._stdin, CHUNK_BYTES)
        except OSError:
            return b""
        finally:
            loop.remove_reader(self._stdin)

    def write(self, data: bytes) -> None:
        """
        Write output, all of it.
        """
        view = memoryview(data)
        while view:
            view = view[os.write(self._stdout, view) :]

    def size(self) -> tuple[int, int] | None:
        """
        Rows and columns of the terminal, None if there is none.
        """
        try:
            size = os.get_terminal_size(self._stdout)
        except OSError:
            return None
        return size.lines, size.columns


def is_terminal() -> bool:
    """
    Whether the caller's input is a terminal.
    """
    return sys.stdin.isatty()
