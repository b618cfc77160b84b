"""The caller's terminal and the sandbox's: copied both ways, resized, given back."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator

import pytest

from clawker_cp.cli.terminal import TerminalBridge

LIMIT_S = 5.0


@pytest.fixture
def caller() -> Iterator[tuple[int, int]]:
    """A terminal of the test's: what its owner holds, and what the client has as standard streams."""
    owner, client = pty.openpty()
    os.set_blocking(owner, False)
    yield owner, client
    os.close(owner)
    os.close(client)


def size(fd: int) -> tuple[int, int]:
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    return rows, columns


def set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


async def read(fd: int, wanted: bytes) -> bytes:
    """Read until something has come."""
    got = b""
    async with asyncio.timeout(LIMIT_S):
        while wanted not in got:
            try:
                got += os.read(fd, 65536)
            except BlockingIOError:
                await asyncio.sleep(0)
    return got


async def test_bytes_pass_both_ways_and_the_terminal_is_given_back(caller: tuple[int, int]) -> None:
    """Keys reach the sandbox raw, its output reaches the caller, and the caller's settings are as before at the end."""
    owner, client = caller
    before = termios.tcgetattr(client)
    bridge = TerminalBridge(client, client)
    bridge.open()
    sandbox = os.dup(bridge.slave)
    os.set_blocking(sandbox, False)
    bridge.release_slave()
    bridge.start()
    during = termios.tcgetattr(client)
    os.write(owner, b"keys\n")
    heard = await read(sandbox, b"keys")
    os.write(sandbox, b"answer")
    told = await read(owner, b"answer")
    os.close(sandbox)
    await bridge.wait_drained(LIMIT_S)
    bridge.close()
    bridge.close()

    assert (heard, told.endswith(b"answer")) == (b"keys\n", True)
    assert not during[3] & termios.ICANON
    assert termios.tcgetattr(client) == before


async def test_the_sandbox_has_the_callers_size(caller: tuple[int, int]) -> None:
    """From the start, and after each change."""
    owner, client = caller
    set_size(owner, 33, 101)
    bridge = TerminalBridge(client, client)
    bridge.open()
    first = size(bridge.slave)
    set_size(owner, 44, 120)
    bridge.resize()
    second = size(bridge.slave)
    bridge.close()

    assert (first, second) == ((33, 101), (44, 120))


async def test_a_paste_larger_than_the_queue_waits_for_its_reader(caller: tuple[int, int]) -> None:
    """Every byte of a paste arrives, though the pseudo-terminal takes a few thousand at a time."""
    owner, client = caller
    bridge = TerminalBridge(client, client)
    bridge.open()
    sandbox = os.dup(bridge.slave)
    os.set_blocking(sandbox, False)
    attributes = termios.tcgetattr(sandbox)
    attributes[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(sandbox, termios.TCSANOW, attributes)
    bridge.release_slave()
    bridge.start()
    paste, got = b"p" * 40_000, b""
    left = memoryview(paste)
    async with asyncio.timeout(LIMIT_S):
        while len(got) < len(paste):
            try:
                left = left[os.write(owner, left) :] if left else left
            except BlockingIOError:
                pass
            await asyncio.sleep(0)
            try:
                got += os.read(sandbox, 65536)
            except BlockingIOError:
                continue
    os.close(sandbox)
    bridge.close()

    assert got == paste
