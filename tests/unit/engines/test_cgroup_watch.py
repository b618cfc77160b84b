"""New cgroups are seen as they are made, whatever happens to the directories they are made in."""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from clawker_cp.engines.docker.cgroup_watch import CgroupWatch, Missed
from clawker_cp.errors import Unavailable
from clawker_cp.testing.world import cgroup2_mount

LIMIT_S = 10.0


@pytest.fixture
def base() -> Iterator[Path]:
    """A cgroup of this test's own."""
    made = cgroup2_mount() / f"ckw{os.getpid()}-{secrets.token_hex(2)}"
    made.mkdir()
    try:
        yield made
    finally:
        for directory, _names, _files in os.walk(made, topdown=False):
            Path(directory).rmdir()


async def following(watch: CgroupWatch, *wanted: Path) -> None:
    """What comes next is, in this order, what was wanted; something told twice is let pass."""
    told: set[Path | Missed] = set()
    for path in wanted:
        while (seen := await asyncio.wait_for(anext(watch), LIMIT_S)) in told and seen != path:
            pass
        assert seen == path
        told.add(seen)


@pytest.mark.root
async def test_each_new_cgroup_is_told_once(base: Path) -> None:
    """Cgroups made below several parents are told in the order they were made; what was there before is not."""
    docker, slices = base / "docker", base / "system.slice"
    for directory in (docker, slices, docker / "old"):
        directory.mkdir()
    made = [docker / "one", slices / "docker-two.scope", docker / "three"]

    async with CgroupWatch([docker, slices]) as watch:
        for path in made:
            path.mkdir()
            (path / "inner").mkdir()
        (docker / "old").rmdir()
        await following(watch, *made)
        (docker / "last").mkdir()
        assert await asyncio.wait_for(anext(watch), LIMIT_S) == docker / "last"


@pytest.mark.root
async def test_a_waiting_reader_is_told_at_once(base: Path) -> None:
    """Who waits already is woken by the new cgroup."""
    async with CgroupWatch([base]) as watch:
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        (base / "one").mkdir()
        assert await asyncio.wait_for(waiting, LIMIT_S) == base / "one"


@pytest.mark.root
async def test_a_parent_that_comes_later_is_watched(base: Path) -> None:
    """A parent that the engine makes with its first container tells of that one and of the next, levels deep."""
    parent = base / "actions" / "docker"

    async with CgroupWatch([parent]) as watch:
        (parent / "first").mkdir(parents=True)
        (base / "else").mkdir()
        await following(watch, parent / "first")
        (parent / "second").mkdir()
        await following(watch, parent / "second")


@pytest.mark.root
async def test_a_parent_may_be_removed_and_made_again(base: Path) -> None:
    """After its end, read or unread, the next directory of that name is watched, and what is in it told."""
    parent = base / "docker"
    parent.mkdir()

    async with CgroupWatch([parent]) as watch:
        for name in ("one", "two", "three"):
            (parent / name).mkdir()
            await following(watch, parent / name)
            (parent / name).rmdir()
            parent.rmdir()
            parent.mkdir()


@pytest.mark.root
async def test_many_in_a_row_are_all_told(base: Path) -> None:
    """A thousand cgroups, made and removed without a reader, are all told."""
    wanted = [base / f"box{number}" for number in range(1000)]

    async with CgroupWatch([base]) as watch:
        for path in wanted:
            path.mkdir()
            path.rmdir()
        await following(watch, *wanted)


async def test_an_overflow_is_told(tmp_path: Path) -> None:
    """When the kernel's queue overflows the reader is told to list, and hears of what is made afterwards."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())

    async with CgroupWatch([tmp_path]) as watch:
        for number in range(most // 2 + 10):
            path = tmp_path / f"box{number}"
            path.mkdir()
            path.rmdir()
        told = 0
        while await asyncio.wait_for(anext(watch), LIMIT_S) != Missed():
            told += 1
        (tmp_path / "after").mkdir()
        assert await asyncio.wait_for(anext(watch), LIMIT_S) == tmp_path / "after"
    assert told < most


def test_it_works_on_the_loop_of_the_server(tmp_path: Path) -> None:
    """A reader that waits on uvloop is woken, again and again."""

    async def watched() -> None:
        async with CgroupWatch([tmp_path]) as watch, asyncio.TaskGroup() as group:
            for number in range(20):
                waiting = group.create_task(anext_of(watch))
                await asyncio.sleep(0)
                (tmp_path / f"box{number}").mkdir()
                assert await asyncio.wait_for(waiting, LIMIT_S) == tmp_path / f"box{number}"

    async def anext_of(watch: CgroupWatch) -> Path | Missed:
        return await anext(watch)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(watched())


async def test_files_are_no_cgroups(tmp_path: Path) -> None:
    """Only directories are told."""
    async with CgroupWatch([tmp_path]) as watch:
        (tmp_path / "file").write_text("")
        (tmp_path / "box").mkdir()
        await following(watch, tmp_path / "box")


async def test_cancelling_the_reader_loses_nothing_after(tmp_path: Path) -> None:
    """A reader that is cancelled while it waits leaves the watch whole for the next."""
    async with CgroupWatch([tmp_path]) as watch:
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        (tmp_path / "box").mkdir()
        await following(watch, tmp_path / "box")


async def test_its_end_gives_every_descriptor_back(tmp_path: Path) -> None:
    """After the block no descriptor is left, and a later read ends."""
    before = set(os.listdir("/proc/self/fd"))
    async with CgroupWatch([tmp_path, tmp_path / "missing" / "deep"]) as watch:
        pass
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(StopAsyncIteration):
        await anext(watch)


async def test_no_watch_left_is_said(tmp_path: Path) -> None:
    """Where the kernel gives no instance, the error names the sysctl."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)  # a process may have open files above it: no number below may be left
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(Unavailable, match="cannot watch"):
            await CgroupWatch([tmp_path]).__aenter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
