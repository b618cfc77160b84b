"""Tests of the child that outlives us; real processes throughout."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from clawker_cp.errors import Unavailable
from clawker_cp.processes.lasting import LastingProcess, start_time
from clawker_cp.testing.descriptors import beyond_select


def _make(directory: Path, *command: str) -> LastingProcess:
    return LastingProcess("child", command or ("sleep", "60"), directory / "child.pid", directory / "child.log")


async def test_the_next_start_adopts_what_was_left_running(tmp_path: Path) -> None:
    """Same digest, same process; it keeps running in between."""
    first = _make(tmp_path)
    assert await first.start("d") is False
    pid = first.pid
    first.let_live()
    second = _make(tmp_path)

    assert await second.start("d") is True
    assert second.pid == pid
    assert second.running
    await second.stop()
    assert start_time(pid) is None


KILLED_BEFORE_THE_MARK = """
import asyncio, os, signal, sys
from pathlib import Path
from clawker_cp.processes.lasting import LastingProcess
LastingProcess._write_mark = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
here = Path(sys.argv[1])
process = LastingProcess("child", ("touch", str(here / "ran")), here / "child.pid", here / "child.log")
asyncio.run(process.start("d"))
"""


async def test_a_child_that_nobody_could_find_again_never_runs(tmp_path: Path) -> None:
    """Whoever is killed between the fork and the mark leaves a child that ends at its gate."""
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED_BEFORE_THE_MARK, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
        await killed.wait()
        assert killed.stdout is not None
    left = LastingProcess("child", ("sleep", "60"), tmp_path / "child.pid", tmp_path / "child.log")
    adopted = await left.start("d")
    await left.stop()

    assert killed.returncode == -signal.SIGKILL and not adopted
    assert not (tmp_path / "ran").exists()


async def test_another_digest_ends_the_old_one(tmp_path: Path) -> None:
    """A process that was started with something else is ended before a new one is launched."""
    first = _make(tmp_path)
    await first.start("old")
    pid = first.pid
    first.let_live()
    second = _make(tmp_path)

    assert await second.start("new") is False
    assert second.pid != pid
    assert start_time(pid) is None
    await second.stop()


async def test_a_reused_pid_is_nobody_we_know(tmp_path: Path) -> None:
    """The start time in the mark has to fit: another process with that pid is left alone."""
    import orjson

    (tmp_path / "child.pid").write_bytes(orjson.dumps({"pid": os.getpid(), "started": 1, "digest": "d"}))
    process = _make(tmp_path)

    assert await process.start("d") is False
    assert process.pid != os.getpid()
    await process.stop()


async def test_the_end_is_noticed_and_the_last_words_are_kept(tmp_path: Path) -> None:
    """`wait` returns when it ends; its output is in the log."""
    process = _make(tmp_path, "sh", "-c", "echo last words; exit 3")
    await process.start("d")
    await asyncio.wait_for(process.wait(), 10)

    assert not process.running
    assert process.last_output() == "last words"
    await process.stop()
    assert not (tmp_path / "child.pid").exists()


async def test_a_child_that_would_not_be_found_again_is_ended(tmp_path: Path) -> None:
    """Where the mark cannot be written nothing runs on; and one that ended is no zombie of ours."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    lost = LastingProcess("child", ("sleep", "60"), tmp_path / "gone" / "child.pid", tmp_path / "child.log")
    with pytest.raises(Unavailable, match="cannot keep hold of child"):
        await lost.start("d")
    assert not lost.running
    assert children.read_text() == before

    process = _make(tmp_path)
    await process.start("d")
    await process.stop()
    assert children.read_text() == before


async def test_what_cannot_be_started_says_so(tmp_path: Path) -> None:
    """A missing binary is `Unavailable`, naming it."""
    with pytest.raises(Unavailable, match="/nonexistent"):
        await _make(tmp_path, "/nonexistent").start("d")


async def test_all_who_wait_hear_of_the_end(tmp_path: Path) -> None:
    """Who supervises it and who ends it wait at the same time; letting it live ends the waiting as well."""
    process = _make(tmp_path)
    await process.start("d")
    waiting = [asyncio.ensure_future(process.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await process.stop()
        await asyncio.gather(*waiting)
    await process.start("d")
    pid = process.pid
    waiting = [asyncio.ensure_future(process.wait())]
    await asyncio.sleep(0)
    process.let_live()
    async with asyncio.timeout(10):
        await asyncio.gather(*waiting)
    assert start_time(pid) is not None
    await process.start("d")  # adopted: a waiter that goes away leaves the others
    leaving, staying = (asyncio.ensure_future(process.wait()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait([leaving])
        await process.stop()
        await staying
    assert leaving.cancelled()


async def test_an_old_one_is_ended_by_a_server_with_thousands_of_descriptors(tmp_path: Path) -> None:
    """A number that select(2) refuses keeps nobody from ending what another start left running."""
    first = _make(tmp_path)
    await first.start("old")
    pid = first.pid
    first.let_live()
    second = _make(tmp_path)
    with beyond_select():
        assert await second.start("new") is False
        assert start_time(pid) is None
        await second.stop()
