"""One connection is one sandbox: what is asked for runs, and what is wrong is answered in words."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from clawker_cp.errors import Conflict
from clawker_cp.rpc import local_server
from clawker_cp.rpc.local_protocol import LocalChannel, connect
from clawker_cp.rpc.local_server import LocalServer
from clawker_cp.testing.descriptors import no_descriptor_left


class World:
    """Lives and reports of one sandbox that ends when it is signalled."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.stopped = False
        self.ended = asyncio.Event()

    @asynccontextmanager
    async def prepared(self, request: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(id="id1", address="198.51.100.1")

    async def launch(self, sandbox_id: str, streams: tuple[int, int, int]) -> None:
        assert all(os.fstat(fd) for fd in streams)

    async def finish(self, sandbox_id: str) -> int:
        await self.ended.wait()
        return 7

    async def signal(self, sandbox_id: str, signo: int) -> None:
        self.signals.append(signo)
        if signo:
            self.ended.set()

    async def stop(self, sandbox_id: str, *, grace_s: float) -> None:
        self.stopped = True
        self.ended.set()

    def knows(self, sandbox_id: str) -> bool:
        return sandbox_id == "id1"

    @asynccontextmanager
    async def watch(self, sandbox_id: str) -> AsyncIterator[AsyncIterator[Mapping[str, Any]]]:
        async def flows() -> AsyncIterator[Mapping[str, Any]]:
            yield {"host": "a.example"}

        yield flows()

    def ending(self, sandbox_id: str) -> Mapping[str, Any]:
        return {"denied": 1}

    async def settle(self, sandbox_id: str) -> None:
        return


@asynccontextmanager
async def talking(path: Path, world: World) -> AsyncIterator[LocalChannel]:
    server = LocalServer(path, world, world, lambda request: request)
    server.open()
    assert path.stat().st_mode & 0o777 == 0o600
    gone = asyncio.Event()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve(gone.set))
        channel = await connect(path, (0, 1, 2), 1)
        try:
            yield channel
        finally:
            await channel.aclose()
            await gone.wait()
            serving.cancel()
            server.close()
    assert server.idle and not path.exists()


async def test_a_run_is_told_from_creation_to_exit(tmp_path: Path) -> None:
    """The client hears of creation, start, decisions and the exit code, and its signals arrive."""
    world = World()
    async with talking(tmp_path / "run.sock", world) as channel:
        await channel.send({"op": "run"})
        heard = [await channel.receive() for _ in range(3)]
        assert [message and message["event"] for message in heard] == ["created", "started", "flow"]
        await channel.send({"op": "signal", "signo": 15})
        assert await channel.receive() == {"event": "exit", "code": 7, "denied": 1}
    assert world.signals == [15]


async def test_who_attaches_is_told_that_it_runs(tmp_path: Path) -> None:
    """A client whose server died before it could say so hears it from the next."""
    world = World()
    async with talking(tmp_path / "run.sock", world) as channel:
        await channel.send({"op": "attach", "id": "id1"})
        heard = [await channel.receive() for _ in range(2)]
        world.ended.set()
        heard.append(await channel.receive())
    assert [message and message["event"] for message in heard] == ["started", "flow", "exit"]


@pytest.mark.parametrize(
    ("asked", "said"), [({"op": "x"}, "not run or attach"), ({"op": "attach", "id": "i"}, "ended")]
)
async def test_what_cannot_be_done_is_answered(tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    """An unknown operation and a sandbox that is gone are errors in words."""
    async with talking(tmp_path / "run.sock", World()) as channel:
        await channel.send(asked)
        answer = await channel.receive()
        assert answer is not None and answer["event"] == "error" and said in answer["message"]


async def test_the_last_of_several_clients_takes_the_sandbox_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes while another follows ends nothing; the count is of those that are there."""
    monkeypatch.setattr(local_server, "ORPHAN_GRACE_S", 0.0)
    world, path = World(), tmp_path / "run.sock"
    server = LocalServer(path, world, world, lambda request: request)
    server.open()
    gone = asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        serving = group.create_task(server.serve(gone.set))
        channels = [await connect(path, (0, 1, 2), 1) for _ in range(2)]
        for channel in channels:
            await channel.send({"op": "attach", "id": "id1"})
            assert await channel.receive() == {"event": "started"}
        await channels[0].aclose()
        await channels[1].send({"op": "signal", "signo": 0})
        while not world.signals:
            await asyncio.sleep(0)
        lives = not world.stopped
        await channels[1].aclose()
        await world.ended.wait()
        while not server.idle:
            await gone.wait()
            gone.clear()
        serving.cancel()
    server.close()

    assert lives and world.stopped and not server.attached("id1")


async def test_serving_needs_an_open_socket(tmp_path: Path) -> None:
    """A server that was never opened says so."""
    world = World()
    server = LocalServer(tmp_path / "run.sock", world, world, lambda request: request)
    with pytest.raises(Conflict, match="not open"):
        await server.serve(lambda: None)


async def test_a_client_that_finds_no_descriptor_left_is_served_once_there_is_one(tmp_path: Path) -> None:
    """Running out of descriptors ends neither the server nor anybody's run: who comes meanwhile waits."""
    world, path = World(), tmp_path / "run.sock"
    server = LocalServer(path, world, world, lambda request: request)
    server.open()
    gone = asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        channel = await connect(path, (0, 1, 2), 1)
        await channel.send({"op": "dance"})
        with capture_logs() as logs, no_descriptor_left():
            serving = group.create_task(server.serve(gone.set))
            while not logs:
                await asyncio.sleep(0)
            assert not serving.done()
        said = await channel.receive()
        await channel.aclose()
        await gone.wait()
        serving.cancel()
        server.close()

    assert [one["event"] for one in logs] == ["rpc_local_waits"]
    assert said is not None and said["code"] == "INVALID_INPUT"
