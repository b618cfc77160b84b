"""The Docker client against a peer on its worst days; a healthy daemon is in tests/integration."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from clawker_cp.engines.docker_client import DockerClient, endpoint_from
from clawker_cp.errors import (
    CapacityExceeded,
    ClawkerError,
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    Unavailable,
    Unsupported,
)
from clawker_cp.testing.wayward_engine import Behaviour, Request, WaywardEngine, cut_short, said, silent, trickle

SHORT_S = 0.1
ID = "ab" * 32


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[WaywardEngine]:
    with WaywardEngine(tmp_path / "docker.sock") as made:
        yield made


@pytest_asyncio.fixture
async def client(engine: WaywardEngine) -> AsyncIterator[DockerClient]:
    made = DockerClient(engine.endpoint, threads=2, limit_s=20)
    yield made
    await made.aclose()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("docker")]


@pytest.mark.parametrize(
    ("variable", "endpoint"),
    [("", "unix:///var/run/docker.sock"), ("unix:///run/user/1000/docker.sock", "unix:///run/user/1000/docker.sock")],
)
def test_endpoint_is_the_variable_or_the_default(variable: str, endpoint: str) -> None:
    """DOCKER_HOST names the socket; without it the engine's usual one is taken."""
    assert endpoint_from({"DOCKER_HOST": variable}) == endpoint
    assert endpoint_from({}) == "unix:///var/run/docker.sock"


@pytest.mark.parametrize(
    "wrong",
    ["tcp://192.0.2.1:2375", "unix://run/docker.sock", "/run/docker.sock", "ssh://h", "unix://", "unix:///a\0b"],
)
def test_endpoint_that_is_no_absolute_unix_path_is_refused_by_name(wrong: str) -> None:
    """Anything but an absolute unix:// path is refused with the variable and the value."""
    with pytest.raises(InvalidInput, match="DOCKER_HOST") as refused:
        endpoint_from({"DOCKER_HOST": wrong})

    assert repr(wrong) in str(refused.value)
    assert "unix:///var/run/docker.sock" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("status", "category"),
    [(404, NotFound), (409, Conflict), (403, Conflict), (400, InvalidInput), (500, Unavailable), (503, Unavailable)],
)
async def test_refusals_become_categories_with_the_engines_words(
    engine: WaywardEngine, client: DockerClient, status: int, category: type[ClawkerError]
) -> None:
    """Each status of the engine becomes one of our categories and keeps what the engine said."""
    engine.behaviours["/json"] = said(status, {"message": "so says the engine"})

    with pytest.raises(category, match="so says the engine"):
        await client.inspect(ID)


@pytest.mark.parametrize(
    "body",
    [b"", b"not json", b"[1]", b"null", b'{"Id": ', b"\xff\xfe"],
    ids=["empty", "text", "list", "null", "half", "bytes"],
)
async def test_answers_that_are_no_object_are_unavailable(
    engine: WaywardEngine, client: DockerClient, body: bytes
) -> None:
    """An answer that is not what the API promises is an engine that does not work, not a crash."""
    engine.behaviours["/json"] = said(200, body)

    with pytest.raises(Unavailable):
        await client.inspect(ID)


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", [silent, trickle], ids=["silent", "trickling"])
async def test_engine_that_never_finishes_costs_a_limit_and_no_thread(
    engine: WaywardEngine, behaviour: Behaviour
) -> None:
    """Calls to an engine that stays silent, or trickles, fail at the limit, and their threads serve the next ones."""
    engine.behaviours["/json"] = behaviour
    client = DockerClient(engine.endpoint, threads=2, limit_s=1)
    told = []

    async def ask() -> None:
        try:
            await client.inspect(ID)
        except Unavailable as error:
            told.append(str(error))

    try:
        async with asyncio.timeout(15), asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(ask())
        engine.behaviours["/json"] = said(200, {"Id": ID})
        answer = await client.inspect(ID)
    finally:
        await client.aclose()

    assert len(told) == 6
    assert all("did not answer within 1 s (inspect" in message for message in told)
    assert answer == {"Id": ID}
    assert client.statistics() == {"answered": 1, "failed": 6, "under_way": 0}


async def test_cancelled_call_frees_caller_and_thread_at_once(engine: WaywardEngine) -> None:
    """Cancelling more calls than there are threads returns at once, and the engine sees the connections go."""
    engine.behaviours["/json"] = silent
    client = DockerClient(engine.endpoint, threads=2, limit_s=60)
    try:
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(client.inspect(ID)) for _ in range(6)]
            while sum("/json" in request for request in engine.requests) < 2:
                await asyncio.sleep(0)
            began = time.monotonic()
            for call in calls:
                call.cancel()
        assert time.monotonic() - began < 5
        assert all(call.cancelled() for call in calls)
        assert await asyncio.to_thread(engine.gone.wait, 10)
        engine.behaviours["/json"] = said(200, {"Id": ID})
        async with asyncio.timeout(10):
            assert await client.inspect(ID) == {"Id": ID}
    finally:
        await client.aclose()


async def test_engine_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    """Without a daemon the error names the endpoint and the variable that sets it."""
    client = DockerClient(f"unix://{tmp_path}/none.sock")
    try:
        with pytest.raises(Unavailable, match="none.sock.*No such file") as refused:
            await client.ping()
    finally:
        await client.aclose()

    assert "DOCKER_HOST" in str(refused.value.hint)


async def test_listener_that_accepts_nobody_is_unavailable(tmp_path: Path) -> None:
    """A socket with a full backlog fails within the limit."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "full.sock"))
        listener.listen(0)
        client = DockerClient(f"unix://{tmp_path}/full.sock", threads=4, limit_s=SHORT_S)
        try:
            for _ in range(4):
                with pytest.raises(Unavailable):
                    await client.ping()
        finally:
            await client.aclose()


async def test_engine_that_goes_away_in_the_middle_is_unavailable_and_found_again(
    engine: WaywardEngine, client: DockerClient
) -> None:
    """An answer cut short fails that call only; the next one connects anew."""
    engine.behaviours["/json"] = cut_short
    with pytest.raises(Unavailable):
        await client.inspect(ID)
    engine.behaviours["/json"] = said(200, {"Id": ID})

    assert await client.inspect(ID) == {"Id": ID}


async def test_engine_replaced_by_an_older_one_is_asked_again_what_it_speaks(
    engine: WaywardEngine, client: DockerClient
) -> None:
    """A daemon that refuses the API version after a downgrade is spoken to in the version it names now."""
    engine.behaviours["/v1.41/containers/x/json"] = said(200, {"Id": ID})
    await client.inspect("x")
    engine.behaviours["/version"] = said(200, {"ApiVersion": "1.40"})
    engine.behaviours["/v1.41/containers/x/json"] = said(
        400, {"message": "client version 1.41 is too new. Maximum supported API version is 1.40"}
    )
    engine.behaviours["/v1.40/containers/x/json"] = said(200, {"Id": "older"})

    assert await client.inspect("x") == {"Id": "older"}


async def test_engine_too_old_is_unsupported(tmp_path: Path) -> None:
    """A daemon whose API the SDK no longer speaks is told as unsupported."""
    with WaywardEngine(tmp_path / "old.sock", api_version="1.12") as engine:
        client = DockerClient(engine.endpoint)
        try:
            with pytest.raises(Unsupported):
                await client.info()
        finally:
            await client.aclose()


@pytest.mark.parametrize("wrong", ["", "../info", "a b", "a\nb", "x/../../info", "-x", "a?b=c", "x" * 600, "ä"])
async def test_what_is_no_reference_never_reaches_the_engine(
    engine: WaywardEngine, client: DockerClient, wrong: str
) -> None:
    """A reference that would change the request's path is refused before anything is sent."""
    with pytest.raises(InvalidInput):
        await client.inspect(wrong)

    assert engine.requests == []


async def test_wait_that_takes_longer_than_it_may_is_a_deadline(engine: WaywardEngine, client: DockerClient) -> None:
    """Waiting for an end that does not come within its own limit is told as such, not as a dead engine."""
    engine.behaviours["/wait"] = silent
    with pytest.raises(DeadlineExceeded, match="did not end"):
        await client.wait(ID, limit_s=SHORT_S)


async def test_archive_beyond_its_bound_is_refused(engine: WaywardEngine, client: DockerClient) -> None:
    """A file that is larger than asked for stops the transfer."""

    def endless(request: Request) -> None:
        head = "HTTP/1.1 200 OK\r\nX-Docker-Container-Path-Stat: e30=\r\nTransfer-Encoding: chunked\r\n\r\n"
        request.connection.sendall(head.encode())
        try:
            while not request.engine.ending.is_set():
                request.chunk(bytes(65536))
        except OSError:
            request.engine.gone.set()

    engine.behaviours["/archive"] = endless
    with pytest.raises(CapacityExceeded):
        await client.get_archive(ID, "/big", most=1 << 20)
    assert await asyncio.to_thread(engine.gone.wait, 10)


async def test_closing_ends_calls_under_way(engine: WaywardEngine) -> None:
    """aclose returns at once although a call hangs; that call and later ones are told unavailable."""
    engine.behaviours["/json"] = silent
    client = DockerClient(engine.endpoint, threads=1, limit_s=60)
    failures = []

    async def ask() -> None:
        try:
            await client.inspect(ID)
        except Unavailable as error:
            failures.append(error)

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(ask())
        group.create_task(ask())  # waits for the one thread
        while not any("/json" in request for request in engine.requests):
            await asyncio.sleep(0)
        await client.aclose()
    await client.aclose()

    assert len(failures) == 2
    with pytest.raises(Unavailable):
        await client.ping()


async def test_connections_are_kept_per_thread(engine: WaywardEngine, client: DockerClient) -> None:
    """Many calls use as many connections as there are threads, and one question for the version each at most."""
    engine.behaviours["/json"] = said(200, {"Id": ID})
    async with asyncio.TaskGroup() as group:
        for _ in range(40):
            group.create_task(client.inspect(ID))

    assert sum("/json" in request for request in engine.requests) == 40
    assert engine.open_connections <= 4


async def test_proxies_of_the_environment_are_not_used(
    engine: WaywardEngine, client: DockerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy for the user's web traffic does not stand between us and a local socket."""
    monkeypatch.setenv("ALL_PROXY", "http://192.0.2.1:3128")
    engine.behaviours["/info"] = said(200, {"Driver": "x"})

    assert await client.info() == {"Driver": "x"}


async def test_lists_ask_for_labels_and_states(engine: WaywardEngine, client: DockerClient) -> None:
    """Label filters reach the engine as it wants them, and only `every` asks for stopped containers."""
    engine.behaviours["/containers/json"] = said(200, [{"Id": ID}])
    await client.list_containers(labels={"a": "b"})
    await client.list_containers(every=True)
    first, second = (request for request in engine.requests if "containers" in request)

    assert "all=0" in first
    assert json.dumps({"label": ["a=b"]}).replace(" ", "") in _unquoted(first)
    assert "all=1" in second


async def test_networks_of_a_similar_name_are_not_meant(engine: WaywardEngine, client: DockerClient) -> None:
    """The engine matches names by part; only the exact name counts."""
    engine.behaviours["/networks"] = said(200, [{"Name": "clawker-net-2"}, {"Name": "clawker-net"}])

    assert await client.list_networks("clawker-net") == [{"Name": "clawker-net"}]


def _unquoted(request: str) -> str:
    from urllib.parse import unquote_plus

    return unquote_plus(request).replace(" ", "")
