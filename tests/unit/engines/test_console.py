"""The kept ends of a sandbox's streams: nothing is lost while somebody follows, and a killed server gets them back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest

from clawker_cp.engines.host import console as module
from clawker_cp.engines.host.console import Console, discard
from clawker_cp.engines.host.process import start_time
from clawker_cp.errors import Conflict, InvalidInput, Unavailable
from clawker_cp.testing.descriptors import beyond_select, no_descriptor_left


@asynccontextmanager
async def command(directory: Path, script: str, *, tty: bool = False) -> AsyncIterator[Console]:
    """A shell on a console's streams, as the engine starts commands."""
    console, streams = Console.open(directory, tty=tty)
    process = subprocess.Popen(
        ["setsid", "--ctty", "sh", "-c", script] if tty else ["sh", "-c", script],
        stdin=streams[0], stdout=streams[1], stderr=streams[2],
    )  # fmt: skip
    for fd in streams:
        os.close(fd)
    console.start()
    try:
        yield console
    finally:
        console.close()
        process.kill()
        process.wait()


async def everything(console: Console) -> bytes:
    async with asyncio.timeout(20), console.attach() as attached:
        output = b""
        while chunk := await attached.read():
            output += chunk
        return output


async def test_output_of_before_is_kept_for_who_attaches(tmp_path: Path) -> None:
    """Both streams, in their order, and then the end."""
    async with command(tmp_path, "echo one; echo two >&2; echo three") as console:
        assert await everything(console) == b"one\ntwo\nthree\n"


async def test_input_reaches_the_command_and_ends(tmp_path: Path) -> None:
    """What is written is read; closing the input ends it although a holder keeps the streams."""
    async with command(tmp_path, "cat; echo done") as console:
        async with asyncio.timeout(20), console.attach() as attached:
            await attached.write(b"hello\n")
            assert await attached.read() == b"hello\n"
            attached.close_input()
            await attached.write(b"nobody reads this")
            assert await attached.read() == b"done\n"
            assert await attached.read() == b""


async def test_nothing_is_lost_while_somebody_follows_slowly(tmp_path: Path) -> None:
    """Ten megabytes through a reader that comes late: the command waits, every byte arrives."""
    async with command(tmp_path, "head -c 10000000 /dev/zero | tr '\\0' x") as console:
        async with asyncio.timeout(30), console.attach() as attached:
            size = 0
            while chunk := await attached.read():
                assert len(chunk) <= module.CHUNK_BYTES
                size += len(chunk)
                assert console._held <= module.BACKLOG_BYTES + module.CHUNK_BYTES
        assert size + console.lost_bytes == 10_000_000 and console.lost_bytes == 0


async def test_with_nobody_there_the_latest_is_kept_and_the_rest_counted(tmp_path: Path) -> None:
    """The command is not held up; what went is a number."""
    async with command(tmp_path, "head -c 1000000 /dev/zero | tr '\\0' x; echo end") as console:
        async with asyncio.timeout(20):
            while not console._ended:
                await asyncio.sleep(0)
        output = await everything(console)
        assert output.endswith(b"xend\n") and len(output) <= module.BACKLOG_BYTES
        assert len(output) + console.lost_bytes == 1_000_004


async def test_two_do_not_follow_at_once(tmp_path: Path) -> None:
    """The second is refused, and may come when the first has gone."""
    async with command(tmp_path, "cat") as console:
        async with console.attach():
            with pytest.raises(Conflict):
                async with console.attach():
                    pass
        async with console.attach():
            pass


async def test_a_terminal_has_a_size_and_an_end_of_file(tmp_path: Path) -> None:
    """The window is told, a silly one refused, and closing the input is its end-of-file character."""
    script = "read line; stty size; cat; echo over"
    async with command(tmp_path, script, tty=True) as console:
        async with asyncio.timeout(20), console.attach() as attached:
            attached.resize(40, 132)
            with pytest.raises(InvalidInput):
                attached.resize(0, 5)
            await attached.write(b"\n")
            seen = b""
            while b"40 132" not in seen:
                seen += await attached.read()
            attached.close_input()
            while chunk := await attached.read():
                seen += chunk
            assert b"over" in seen


async def test_a_killed_server_gets_the_streams_back(tmp_path: Path) -> None:
    """The command lives on, and its output and input are where they were."""
    script = (
        "import asyncio, os, signal, subprocess, sys\n"
        "from pathlib import Path\nfrom clawker_cp.engines.host.console import Console\n"
        "async def main():\n"
        "    console, streams = Console.open(Path(sys.argv[1]), tty=False)\n"
        "    p = subprocess.Popen(['sh', '-c', 'echo ready; cat; echo bye'], stdin=streams[0], stdout=streams[1],"
        " stderr=streams[2], start_new_session=True)\n"
        "    print(p.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, timeout=60, check=False
    )
    pid = int(done.stdout)
    try:
        assert done.returncode == -signal.SIGKILL and start_time(pid)
        console = Console.reopen(tmp_path)
        assert console is not None
        console.start()
        async with asyncio.timeout(20), console.attach() as attached:
            assert await attached.read() == b"ready\n"
            await attached.write(b"still there\n")
            assert await attached.read() == b"still there\n"
            attached.close_input()
            assert await attached.read() == b"bye\n"
            assert await attached.read() == b""
        console.close()
        assert Console.reopen(tmp_path) is None
    finally:
        if start_time(pid):
            os.kill(pid, signal.SIGKILL)


async def test_leaving_keeps_the_holder_and_closing_ends_it(tmp_path: Path) -> None:
    """After `leave` another control plane can take over; after `close` nothing of it runs."""
    console, streams = Console.open(tmp_path, tty=True)
    for fd in streams[1:]:
        os.close(fd)
    console.start()
    holder = console._holder
    console.leave()
    again = Console.reopen(tmp_path)
    assert again is not None and start_time(holder)
    again.start()
    again.close()
    assert not start_time(holder)
    os.close(streams[0])


@pytest.mark.parametrize("record", [b"", b"{}", b"[]", b'{"holder":1,"started":5,"read":0,"write":0,"tty":false}'])
def test_a_record_of_something_else_is_no_console(tmp_path: Path, record: bytes) -> None:
    """Garbage, and a process that merely has the number, are not taken."""
    (tmp_path / module.RECORD).write_bytes(record)
    assert Console.reopen(tmp_path) is None


@pytest.mark.parametrize("tty", [False, True])
def test_streams_that_cannot_be_kept_leave_nothing(tmp_path: Path, *, tty: bool) -> None:
    """Neither descriptors nor a holder, whether the record cannot be written or no descriptor is left half-way."""

    def ours() -> tuple[set[str], str]:
        return set(os.listdir("/proc/self/fd")), Path(f"/proc/self/task/{os.getpid()}/children").read_text()

    before = ours()
    with pytest.raises(Unavailable, match="cannot write"):
        Console.open(tmp_path / "gone", tty=tty)
    last = [os.dup(0) for _ in range(3)]
    with no_descriptor_left():
        for fd in last:
            os.close(fd)
        with pytest.raises(Unavailable, match="cannot be kept"):
            Console.open(tmp_path, tty=tty)

    assert ours() == before


async def test_a_server_with_thousands_of_descriptors_closes_a_console(tmp_path: Path) -> None:
    """Beyond what select(2) takes the holder is ended, and nothing is left open, as with few."""
    with beyond_select():
        before = len(os.listdir("/proc/self/fd"))
        async with command(tmp_path, "echo done") as console:
            assert await everything(console) == b"done\n"
            holder = console._holder

        assert start_time(holder) == 0
        assert len(os.listdir("/proc/self/fd")) == before


async def test_what_is_left_of_a_sandbox_that_is_gone_is_discarded(tmp_path: Path) -> None:
    """The holder ends with the directory, also for a server that never opened the console; without one nothing does."""
    directory = tmp_path / "one"
    directory.mkdir()
    console, streams = Console.open(directory, tty=False)
    for fd in streams:
        os.close(fd)
    console.leave()
    holder = int(orjson.loads((directory / "console.json").read_bytes())["holder"])
    discard(directory)
    (tmp_path / "two").mkdir()
    discard(tmp_path / "two")

    assert list(tmp_path.iterdir()) == []
    assert start_time(holder) == 0
