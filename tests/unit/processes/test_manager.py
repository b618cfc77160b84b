"""Tests of children that live and die with us; real processes throughout."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable

import pytest

from clawker_cp.errors import Conflict, DeadlineExceeded, InvalidInput, NotFound, Unavailable
from clawker_cp.processes import HealthCheck, SubprocessManager
from clawker_cp.processes.manager import ManagedSubprocess

SERVER = """
import http.server, sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_child_is_started_watched_and_ended() -> None:
    """Name, pid and output are known; shutdown ends it with SIGTERM and no crash is reported."""
    async with SubprocessManager() as manager:
        child = await manager.start("sleeper", ["sh", "-c", "echo hello; exec sleep 60"])
        await _until(lambda: "hello" in child.output)

        assert child.running
        assert (child.name, child.command[0]) == ("sleeper", "sh")
        await manager.shutdown(5)
        assert child.exit_status == -signal.SIGTERM
        assert manager.crash_channel.empty()


async def test_an_unexpected_exit_is_reported_once_with_its_output() -> None:
    """Two children crash: the first one's error is on the channel, with status and last words."""
    async with SubprocessManager() as manager:
        first = await manager.start("first", ["sh", "-c", "echo broken config; exit 3"])
        crash = await asyncio.wait_for(manager.crash_channel.get(), 10)
        second = await manager.start("second", ["false"])
        await second.ended.wait()

        assert "first ended with status 3: broken config" in str(crash)
        assert first.exit_status == 3
        assert manager.crash_channel.empty()


async def test_exits_after_begin_shutdown_are_no_crashes() -> None:
    """Once a drain has begun a child may end by itself."""
    async with SubprocessManager() as manager:
        child = await manager.start("child", ["sleep", "60"])
        manager.begin_shutdown()
        manager.forward_signal(signal.SIGINT)
        await child.ended.wait()

        assert child.exit_status == -signal.SIGINT
        assert manager.crash_channel.empty()


async def test_wait_healthy_returns_when_the_url_answers() -> None:
    """A server that comes up is healthy."""
    port = _free_port()
    async with SubprocessManager() as manager:
        await manager.start("web", [sys.executable, "-c", SERVER, str(port)])
        await manager.wait_healthy("web", HealthCheck(f"http://127.0.0.1:{port}/", 0.05, 10))


async def test_wait_healthy_fails_at_once_when_the_child_dies() -> None:
    """Its last output is in the error, long before the timeout."""
    async with SubprocessManager() as manager:
        await manager.start("web", ["sh", "-c", "echo port is taken; exit 1"])
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match="port is taken"):
                await manager.wait_healthy("web", HealthCheck("http://127.0.0.1:1/", 0.05, 60))


async def test_wait_healthy_ends_at_its_timeout() -> None:
    """A child that lives but never answers is a deadline, naming the URL."""
    async with SubprocessManager() as manager:
        await manager.start("web", ["sleep", "60"])
        with pytest.raises(DeadlineExceeded, match="127.0.0.1"):
            await manager.wait_healthy("web", HealthCheck(f"http://127.0.0.1:{_free_port()}/", 0.05, 0.3))


async def test_shutdown_goes_in_reverse_order_and_kills_the_deaf() -> None:
    """The last started ends first; one that ignores SIGTERM is killed after its time."""
    ended: list[str] = []

    async def note(child: ManagedSubprocess) -> None:
        await child.ended.wait()
        ended.append(child.name)

    async with SubprocessManager() as manager:
        deaf = await manager.start("deaf", ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"])
        other = await manager.start("other", ["sleep", "60"])
        await _until(lambda: "ready" in deaf.output)
        async with asyncio.TaskGroup() as group:
            group.create_task(note(deaf))
            group.create_task(note(other))
            await manager.shutdown(0.3)

    assert ended == ["other", "deaf"]
    assert deaf.exit_status == -signal.SIGKILL


async def test_misuse_is_refused() -> None:
    """A second child of one name, a command that does not exist, an unknown name, nonsense numbers."""
    async with SubprocessManager() as manager:
        await manager.start("one", ["sleep", "60"])
        with pytest.raises(Conflict):
            await manager.start("one", ["sleep", "60"])
        with pytest.raises(Unavailable, match="cannot start"):
            await manager.start("none", ["/nonexistent/binary"])
        with pytest.raises(NotFound):
            await manager.wait_healthy("nobody", HealthCheck("http://127.0.0.1:1/", 1, 1))
    with pytest.raises(InvalidInput):
        HealthCheck("http://127.0.0.1/", 0, 1)
    with pytest.raises(InvalidInput):
        HealthCheck("ftp://127.0.0.1/", 1, 1)


async def test_long_lines_do_not_stop_the_copying(capfd: pytest.CaptureFixture[str]) -> None:
    """A line above the limit is dropped, what follows arrives on our standard error."""
    async with SubprocessManager() as manager:
        command = [sys.executable, "-c", "print('x' * 300000); print('after', flush=True); import time; time.sleep(60)"]
        child = await manager.start("loud", command)
        await _until(lambda: "after" in child.output)

    assert "loud: after" in capfd.readouterr().err
    assert os.getpid() > 0
