"""
An interactive run: a person at a terminal, keys, sizes and job control.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import struct
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from clawker_cp.testing.machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

LIMIT_S = 40.0


class Person:
    """Who sits at the terminal: types, and reads until something is shown."""

    def __init__(self, owner: int, process: asyncio.subprocess.Process) -> None:
        self.owner = owner
        self.process = process
        self.shown = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.owner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self.owner, keys.encode())

    async def sees(self, wanted: str) -> str:
        """Wait until the text is shown; returns all up to it, and forgets that."""
        async with asyncio.timeout(LIMIT_S):
            while wanted.encode() not in self.shown:
                try:
                    self.shown += os.read(self.owner, 65536)
                except BlockingIOError:
                    await asyncio.sleep(0.01)
        before, _, self.shown = self.shown.partition(wanted.encode())
        return before.decode(errors="replace")


@asynccontextmanager
async def at_terminal(machine: Machine, *options: str, command: list[str]) -> AsyncIterator[Person]:
    owner, client = pty.openpty()
    os.set_blocking(owner, False)
    person = Person(owner, await machine.host.start(
        ["setsid", "--ctty", *(word for word in machine.argv(*options, command=command) if word != "--json")],
        env={**machine.environment, "TERM": "dumb"}, stdin=client, stdout=client, stderr=client,
    ))  # fmt: skip
    os.close(client)
    try:
        yield person
    finally:
        if person.process.returncode is None:
            person.process.kill()
            await person.process.wait()
        os.close(owner)


async def test_a_shell_at_a_terminal(machine: Machine) -> None:
    """Ctrl-C ends what the shell runs, Ctrl-Z stops it, sizes follow the window, and the shell's code comes back."""
    async with at_terminal(machine, command=["bash", "--norc"]) as person:
        person.resize(33, 101)
        await person.sees("$ ")
        person.type("stty size; echo size''d\n")
        first = await person.sees("sized")
        person.resize(44, 120)
        person.type("sleep 0.2; stty size; echo size''d\n")
        second = await person.sees("sized")
        person.type("sh -c \"echo go''ing; exec sleep 100\"\n")  # who says so is what the keys are for
        await person.sees("going")
        person.type("\x03")
        await person.sees("$ ")  # what is typed before the shell is back may be flushed with the interrupt
        person.type("echo interrupt''ed $?\n")
        await person.sees("interrupted 130")
        person.type("sh -c \"echo go''ing; exec sleep 100\"\n")  # who says so is what the keys are for
        await person.sees("going")
        person.type("\x1a")
        await person.sees("Stopped")
        await person.sees("$ ")
        person.type("kill %1; curl -s http://198.51.100.10; exit 5\n")
        await person.sees("no_route")
        summary = await person.sees("allow it with: --allow http://198.51.100.10")
        async with asyncio.timeout(LIMIT_S):
            code = await person.process.wait()

    assert "33 101" in first and "44 120" in second
    assert "0 allowed, 1 denied" in summary
    assert code == 5


async def test_ctrl_c_ends_a_command(machine: Machine) -> None:
    """A command at a terminal that does not care is ended by Ctrl-C, with the code a shell gives it."""
    async with at_terminal(machine, command=["sh", "-c", "echo going; sleep 100"]) as person:
        await person.sees("going")
        person.type("\x03")
        async with asyncio.timeout(LIMIT_S):
            while person.process.returncode is None:
                try:
                    person.shown += os.read(person.owner, 65536)
                except OSError:
                    await asyncio.sleep(0.01)

    assert person.process.returncode == 130
