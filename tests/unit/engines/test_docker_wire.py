"""The stream of events: order, bounds, ends, cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp.engines import docker_wire
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.docker_wire import Call, innermost, mapping, mappings, refusal
from clawker_cp.errors import CapacityExceeded, Conflict, InvalidInput, NotFound, Unavailable
from clawker_cp.testing.wayward_engine import Request, WaywardEngine, said, silent


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[WaywardEngine]:
    with WaywardEngine(tmp_path / "docker.sock") as made:
        yield made


@pytest_asyncio.fixture
async def client(engine: WaywardEngine) -> AsyncIterator[DockerClient]:
    made = DockerClient(engine.endpoint, limit_s=20)
    yield made
    await made.aclose()
    for thread in threading.enumerate():
        if thread.name == "docker-events":
            thread.join(10)
            assert not thread.is_alive()


async def test_messages_come_verbatim_however_they_are_cut(engine: WaywardEngine, client: DockerClient) -> None:
    """Messages that share a chunk or span several come out one by one, byte for byte."""

    def tell(request: Request) -> None:
        request.begin_chunks()
        for part in (b'{"a":1}\n{"b"', b": 2}", b"\n\n", b'{"c":3}\n'):
            request.chunk(part)
        request.end_chunks()

    engine.behaviours["/events"] = tell
    seen = []
    with pytest.raises(Unavailable, match="ended the stream"):
        async with client.events("17.000000001") as stream:
            async for message in stream:
                seen.append(message)

    assert seen == [b'{"a":1}', b'{"b": 2}', b'{"c":3}']
    assert "since=17.000000001" in engine.requests[-1]


async def test_leaving_closes_the_response_and_ends_the_thread(engine: WaywardEngine, client: DockerClient) -> None:
    """Leaving the context closes the connection at once, although the engine has nothing to say."""

    def idle(request: Request) -> None:
        request.begin_chunks()
        request.wait_gone()

    engine.behaviours["/events"] = idle
    async with asyncio.timeout(10):
        async with client.events():
            pass
        assert await asyncio.to_thread(engine.gone.wait, 10)


async def test_cancelled_wait_loses_nothing(engine: WaywardEngine, client: DockerClient) -> None:
    """A message that comes after a cancelled wait is there for the next one."""
    go = threading.Event()

    def later(request: Request) -> None:
        request.begin_chunks()
        go.wait(10)
        request.chunk(b"{}\n")
        request.wait_gone()

    engine.behaviours["/events"] = later
    async with asyncio.timeout(10), client.events() as stream:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await anext(stream)
        go.set()
        assert await anext(stream) == b"{}"


async def test_entering_an_engine_that_does_not_answer_fails_at_the_limit(engine: WaywardEngine) -> None:
    """An engine that takes the subscription and stays silent is unavailable, and the thread ends."""
    engine.behaviours["/events"] = silent
    client = DockerClient(engine.endpoint, limit_s=0.1)
    try:
        with pytest.raises(Unavailable, match="did not answer within"):
            async with client.events():
                raise AssertionError("it never answered")
        assert await asyncio.to_thread(engine.gone.wait, 10)
    finally:
        await client.aclose()


async def test_cancelled_entering_ends_the_thread(engine: WaywardEngine, client: DockerClient) -> None:
    """Cancelling while the engine has not answered closes the connection."""
    engine.behaviours["/events"] = silent

    async def enter() -> None:
        async with client.events():
            raise AssertionError("it never answered")

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(enter())
        while not any("events" in request for request in engine.requests):
            await asyncio.sleep(0)
        task.cancel()

    assert await asyncio.to_thread(engine.gone.wait, 10)


async def test_refused_subscription_is_told_on_entering(engine: WaywardEngine, client: DockerClient) -> None:
    """What the engine refuses is an error of its category, not an empty stream."""
    engine.behaviours["/events"] = said(400, {"message": "no such filter"})
    with pytest.raises(InvalidInput, match="no such filter"):
        async with client.events():
            raise AssertionError("it was refused")


async def test_reader_that_never_reads_ends_the_stream(
    engine: WaywardEngine, client: DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound of waiting messages the stream ends; those that fit are read first."""
    monkeypatch.setattr(docker_wire, "EVENTS_WAITING", 3)

    def flood(request: Request) -> None:
        request.begin_chunks()
        request.chunk(b"".join(b'{"n":%d}\n' % number for number in range(10)))
        request.wait_gone()

    engine.behaviours["/events"] = flood
    seen = []
    async with asyncio.timeout(10):
        with pytest.raises(CapacityExceeded) as refused:
            async with client.events() as stream:
                assert await asyncio.to_thread(engine.gone.wait, 10)
                async for message in stream:
                    seen.append(message)

    assert refused.value.limit == "events"
    assert seen == [b'{"n":0}', b'{"n":1}', b'{"n":2}']


async def test_message_without_end_ends_the_stream(
    engine: WaywardEngine, client: DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that never ends does not grow without bound."""
    monkeypatch.setattr(docker_wire, "EVENT_BYTES", 1000)

    def endless(request: Request) -> None:
        request.begin_chunks()
        request.chunk(b"x" * 2000)
        request.wait_gone()

    engine.behaviours["/events"] = endless
    async with asyncio.timeout(10):
        with pytest.raises(CapacityExceeded):
            async with client.events() as stream:
                await anext(stream)


def test_call_that_was_aborted_before_it_began_does_not_begin() -> None:
    """A thread that comes to its request after the caller left sends nothing."""
    call = Call()
    call.abort()
    with pytest.raises(ConnectionAbortedError):
        call.begin(object())


def test_abort_after_the_end_leaves_the_connection_alone() -> None:
    """The connection of a finished call is the next one's."""

    class Connection:
        @property
        def sock(self) -> None:
            raise AssertionError("touched")

    call = Call()
    call.begin(Connection())
    call.end()
    call.abort()


def test_answers_of_the_wrong_form_are_refused() -> None:
    """Only objects and lists of objects are answers."""
    assert mapping({"a": 1}) == {"a": 1}
    assert mappings([{}]) == [{}]
    no_objects: tuple[Any, ...] = (None, [], "x")
    for wrong in no_objects:
        with pytest.raises(Unavailable):
            mapping(wrong)
    no_lists: tuple[Any, ...] = (None, {}, ["x"])
    for wrong in no_lists:
        with pytest.raises(Unavailable):
            mappings(wrong)


def test_refusals_are_bounded_and_named() -> None:
    """A refusal says which call it was, and does not repeat a page of words."""
    error = refusal(404, "no such thing" * 100, "inspect x")

    assert isinstance(error, NotFound)
    assert str(error).startswith("inspect x: no such thing")
    assert len(str(error)) < 600


def test_wrong_state_is_a_conflict_also_as_a_server_error() -> None:
    """Trying again does not help a container that is not paused, whatever status the engine gives that."""
    assert isinstance(refusal(500, f"Container {'a' * 64} is not paused", "unpause"), Conflict)
    assert isinstance(refusal(500, "no space left on device", "create"), Unavailable)


def test_innermost_reason_is_found_also_in_a_circle() -> None:
    """The reason at the bottom is named, and a chain that bites its tail ends."""
    outer, inner = ValueError("outer"), OSError(2, "No such file")
    outer.__cause__ = inner
    assert innermost(outer) == "No such file"
    inner.__context__ = outer

    assert innermost(outer) == "No such file"
