"""What is known of a sandbox's process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clawker_cp.engines.base import Sandbox, SandboxSpec
from clawker_cp.engines.host import process
from clawker_cp.errors import NotFound
from clawker_cp.testing.descriptors import no_descriptor_left

LIMIT_S = 10.0


def sandbox_in(directory: Path, pid: int = 0, started: int = 0) -> Sandbox:
    spec = SandboxSpec("demo", "one", ("true",))
    return Sandbox("ab" * 32, spec, "198.51.100.7", "ns", "veth", Path("/cg"), 1, directory, (), pid, started)


@contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_exit_code_in_the_status_file_wins(tmp_path: Path) -> None:
    """The command's own code is told, whatever the process that carried it returned."""
    (tmp_path / process.STATUS_FILE).write_text('{ "child-pid": 12 }\n{ "exit-code": 7 }\n')
    assert process.exit_code(sandbox_in(tmp_path), 1) == 7


@pytest.mark.parametrize(
    ("returned", "code"), [(None, process.UNKNOWN_EXIT), (1, process.OWN_FAILURE), (0, process.OWN_FAILURE), (-9, 137)]
)
def test_exit_code_without_the_commands_word(tmp_path: Path, returned: int | None, code: int) -> None:
    """A set-up that failed is ours, a signal is told as a shell tells it, and silence means killed."""
    assert process.exit_code(sandbox_in(tmp_path), returned) == code


def test_half_a_line_of_the_status_file_is_not_read(tmp_path: Path) -> None:
    """A line that is still being written hides none of the others."""
    (tmp_path / process.STATUS_FILE).write_text('{ "child-pid": 12 }\n{ "exit-c')
    assert process.status(sandbox_in(tmp_path)) == {"child-pid": 12}


async def test_a_process_on_its_way_to_the_command_is_waited_for(tmp_path: Path) -> None:
    """Whether a command began is asked when it is decided: it was said, or who could say it is gone."""
    for word in ("", '{ "child-pid": 12 }\n'):
        with sleeper() as child:
            sandbox = sandbox_in(tmp_path, child.pid, process.start_time(child.pid))
            waiting = asyncio.ensure_future(process.decided(sandbox))
            await asyncio.sleep(0)
            early = waiting.done()
            if word:
                (tmp_path / process.STATUS_FILE).write_text(word)
            else:
                child.kill()
            async with asyncio.timeout(LIMIT_S):
                await waiting
            assert (early, process.began(sandbox)) == (False, bool(word))


@pytest.mark.parametrize("line", [b"\xff\xfe\x80", b"7", b"[]", b"null", b'{"exit-code": "7"}', b"[" * 100_000])
def test_a_status_file_of_garbage_tells_nothing(tmp_path: Path, line: bytes) -> None:
    """What a crash of the host left there ends nothing: other lines are read, else the command was killed."""
    (tmp_path / process.STATUS_FILE).write_bytes(line + b"\n")
    assert process.exit_code(sandbox_in(tmp_path), None) == process.UNKNOWN_EXIT
    (tmp_path / process.STATUS_FILE).write_bytes(line + b'\n{ "exit-code": 7 }\n')
    assert process.exit_code(sandbox_in(tmp_path), None) == 7


def test_process_that_took_over_a_pid_is_not_ours(tmp_path: Path) -> None:
    """A pid alone does not make a sandbox living: the start time has to be the recorded one."""
    with sleeper() as child:
        started = process.start_time(child.pid)
        assert process.runs(sandbox_in(tmp_path, child.pid, started))
        assert not process.runs(sandbox_in(tmp_path, child.pid, started + 1))
        assert not process.runs(sandbox_in(tmp_path))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.start_time(child.pid) == 0


async def test_what_is_no_process_has_gone() -> None:
    """Only a missing descriptor is waited for; a number that no process can have is nobody's, at once."""
    async with asyncio.timeout(LIMIT_S):
        await process.wait_gone(0)


async def test_end_of_a_process_is_seen(tmp_path: Path) -> None:
    """Waiting ends with the process, and at once for another process with that pid."""
    with sleeper() as child:
        started = process.start_time(child.pid)
        async with asyncio.timeout(LIMIT_S):
            await process.wait_gone(child.pid, started + 1)
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(process.wait_gone(child.pid, started))
                await asyncio.sleep(0)
                assert not waiting.done()
                child.kill()


async def test_a_process_is_not_over_because_there_is_no_descriptor_to_watch_it(tmp_path: Path) -> None:
    """Without a descriptor the wait goes on, and ends with the process once there is one."""
    with sleeper() as child:
        started = process.start_time(child.pid)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            with no_descriptor_left():
                waiting = group.create_task(process.wait_gone(child.pid, started))
                await asyncio.sleep(0)
                assert not waiting.done()
            child.kill()


async def test_sandbox_that_has_ended_has_no_command(tmp_path: Path) -> None:
    """A signal for what has ended finds nothing instead of waiting."""
    (tmp_path / process.STATUS_FILE).write_text('{ "child-pid": 12 }\n{ "exit-code": 7 }\n')
    async with asyncio.timeout(1):
        with pytest.raises(NotFound):
            await process.command_pid(sandbox_in(tmp_path, os.getpid(), process.start_time(os.getpid())))


def test_init_is_killed_only_as_a_child_of_our_own_stage(tmp_path: Path) -> None:
    """A stale child pid in the status file never makes us kill a process of somebody else."""
    with sleeper() as stage, sleeper() as stranger:
        (tmp_path / process.STATUS_FILE).write_text(f'{{ "child-pid": {stranger.pid} }}\n')
        process.kill_init(sandbox_in(tmp_path, stage.pid, process.start_time(stage.pid)))
        assert stranger.poll() is None
        assert process.start_time(stranger.pid)


def test_signal_to_what_is_gone_is_fine() -> None:
    """Signalling an ended process or job raises nothing."""
    with sleeper() as child:
        pid = child.pid
    process.send(pid, signal.SIGTERM)
    process.send(pid, signal.SIGUSR1)
