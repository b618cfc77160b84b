"""Events as one envelope, what a comparison tells, and the feeder over gaps."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.dockerevents import (
    DockerEvent,
    DockerEventFeeder,
    Known,
    differences,
    follow,
    listed,
    parse_event,
    since,
)
from clawker_cp.errors import InvalidInput
from clawker_cp.testing.wayward_engine import Request, WaywardEngine, said

A, B = "a" * 64, "b" * 64


def message(action: str = "start", number: str = A, time_ns: int = 17, **attributes: str) -> bytes:
    body = {"status": action, "id": number, "Type": "container", "Action": action, "scope": "local"}
    actor = {"ID": number, "Attributes": {"name": "x", **attributes}}
    return json.dumps({**body, "Actor": actor, "time": time_ns // 10**9, "timeNano": time_ns}).encode()


def test_message_becomes_an_envelope_that_keeps_it() -> None:
    """Kind, action, id, name, attributes and time are read; the message stays as it came."""
    raw = message("exec_start: sh -c true", time_ns=5_000_000_006, image="tiny")
    event = parse_event(raw)

    assert (event.kind, event.action, event.id, event.name) == ("container", "exec_start: sh -c true", A, "x")
    assert event.attributes == {"name": "x", "image": "tiny"}
    assert event.time_ns == 5_000_000_006
    assert event.raw == raw
    assert not event.synthetic
    assert event.container_id == A


def test_network_event_names_the_container_that_it_is_about() -> None:
    """Joining a network is about the network and about a container; creating one only about the network."""
    raw = json.dumps(
        {"Type": "network", "Action": "connect", "Actor": {"ID": "n1", "Attributes": {"container": A, "name": "net"}}}
    ).encode()

    assert parse_event(raw).container_id == A
    assert parse_event(raw).id == "n1"
    created = json.dumps({"Type": "network", "Action": "create", "Actor": {"ID": "n1", "Attributes": None}}).encode()
    assert parse_event(created).container_id == ""


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        message("", A),
        message("start", ""),
        b'{"Type":"container","Action":1,"Actor":{"ID":"x"}}',
    ],
)
def test_what_is_no_event_is_refused(raw: bytes) -> None:
    """A message without kind, action or id, or of other types, is refused."""
    with pytest.raises(InvalidInput):
        parse_event(raw)


@given(
    st.binary(max_size=300)
    | st.dictionaries(st.text(), st.none() | st.integers() | st.text()).map(lambda d: json.dumps(d).encode())
)
def test_no_bytes_do_more_than_be_refused(raw: bytes) -> None:
    """Whatever comes is an event or `InvalidInput`."""
    try:
        assert parse_event(raw).raw == raw
    except InvalidInput:
        pass


@pytest.mark.parametrize(
    ("time_ns", "text"), [(0, "0.000000000"), (17_000_000_001, "17.000000001"), (999, "0.000000999")]
)
def test_moments_have_nine_digits(time_ns: int, text: str) -> None:
    """The engine reads a fraction as digits after the point: leading zeroes count."""
    assert since(time_ns) == text


RUNNING, PAUSED, EXITED = Known("x", "running"), Known("x", "paused"), Known("x", "exited")


@pytest.mark.parametrize(
    ("known", "found", "actions"),
    [
        pytest.param({}, {A: RUNNING}, ["create", "start"], id="one that was never seen is created and started"),
        pytest.param({}, {A: EXITED}, ["create"], id="a stopped one that was never seen is created"),
        pytest.param({}, {A: PAUSED}, ["create", "start", "pause"], id="a paused one was started before"),
        pytest.param({A: RUNNING}, {}, ["destroy"], id="a vanished one is destroyed"),
        pytest.param({A: RUNNING}, {A: EXITED}, ["die"], id="one that stopped died"),
        pytest.param({A: EXITED}, {A: RUNNING}, ["start"], id="one that runs again was started"),
        pytest.param({A: RUNNING}, {A: PAUSED}, ["pause"], id="paused"),
        pytest.param({A: PAUSED}, {A: RUNNING}, ["unpause"], id="unpaused"),
        pytest.param({A: PAUSED}, {A: EXITED}, ["die"], id="killed while paused"),
        pytest.param({A: EXITED}, {A: PAUSED}, ["start", "pause"], id="started and paused"),
        pytest.param({A: RUNNING}, {A: Known("y", "running")}, ["rename"], id="renamed"),
        pytest.param({A: RUNNING}, {A: RUNNING}, [], id="nothing happened"),
        pytest.param({A: RUNNING}, {A: Known("x", "restarting")}, [], id="restarting is no end"),
        pytest.param({A: RUNNING}, {B: RUNNING}, ["destroy", "create", "start"], id="the vanished come first"),
    ],
)
def test_comparison_tells_what_leads_from_known_to_found(
    known: dict[str, Known], found: dict[str, Known], actions: list[str]
) -> None:
    """The difference of two lists is told as events without a message, and following them arrives at the second."""
    events = differences(known, found, 5)
    followed = dict(known)
    for event in events:
        follow(followed, event)

    assert [event.action for event in events] == actions
    assert all(event.synthetic and event.time_ns == 5 for event in events)
    assert {number: (c.name, c.state in {"running", "paused", "restarting"}) for number, c in followed.items()} == {
        number: (c.name, c.state in {"running", "paused", "restarting"}) for number, c in found.items()
    }
    assert differences(followed, found, 6) == []


def test_vanished_container_keeps_its_labels_to_the_end() -> None:
    """A destroy that is told after a gap has the labels that were last known."""
    known = listed([{"Id": A, "Names": ["/x"], "State": "running", "Labels": {"dev.clawker.agent": "dev"}}])
    (event,) = differences(known, {}, 5)

    assert event.attributes == {"dev.clawker.agent": "dev", "name": "x"}
    assert (event.name, event.container_id) == ("x", A)


def test_event_of_an_unknown_container_that_changes_nothing_makes_none_known() -> None:
    """An exec or a kill of one that was destroyed does not bring it back."""
    known: dict[str, Known] = {}
    for action in ("kill", "exec_start: sh", "health_status: healthy", "destroy"):
        follow(known, DockerEvent("container", action, A))
    follow(known, DockerEvent("network", "create", B))

    assert known == {}


class Engine(WaywardEngine):
    """Lists what it is told to, and streams what it is given until it is told to end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.containers: list[dict[str, Any]] = []
        self.streams: list[Request] = []
        self.history: list[bytes] = []
        self.subscribed = threading.Semaphore(0)
        self.behaviours["/events"] = self._follow
        self.behaviours["/containers/json"] = lambda request: request.answer(200, self.containers)

    def _follow(self, request: Request) -> None:
        request.begin_chunks()
        for raw in self.history:
            request.chunk(raw + b"\n")
        self.streams.append(request)
        self.subscribed.release()
        request.wait_gone()

    def tell(self, raw: bytes) -> None:
        self.streams[-1].chunk(raw + b"\n")

    def end_stream(self) -> None:
        self.streams[-1].end_chunks()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(tmp_path / "docker.sock") as made:
        yield made


class Following:
    """A feeder at work and what it published."""

    def __init__(self, engine: Engine, reconcile_s: float) -> None:
        self.client = DockerClient(engine.endpoint, limit_s=20)
        self.events: asyncio.Queue[DockerEvent] = asyncio.Queue()
        self.changes: list[str] = []
        self.feeder = DockerEventFeeder(
            self.client, self.events.put_nowait, changed=self.changes.append, reconcile_s=reconcile_s
        )

    async def next(self, count: int = 1) -> list[tuple[str, str, bool]]:
        async with asyncio.timeout(20):
            got = [await self.events.get() for _ in range(count)]
        return [(event.action, event.id[0], event.synthetic) for event in got]

    async def __aenter__(self) -> Following:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._task = self._group.create_task(self.feeder.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await self._group.__aexit__(None, None, None)
        await self.client.aclose()


def entry(number: str, state: str = "running") -> dict[str, Any]:
    return {"Id": number, "Names": ["/x"], "State": state, "Labels": {}}


async def test_feeder_subscribes_before_it_lists(engine: Engine) -> None:
    """The subscription, with a moment to begin at, is asked for first; what exists is told before what came in."""
    engine.containers = [entry(A)]
    engine.history = [message("start", A, time_ns=2**62)]
    async with Following(engine, 60) as following:
        told = await following.next(3)
    order = [request.split()[1] for request in engine.requests if "version" not in request]

    assert "/events" in order[0] and "since=" in order[0]
    assert "/containers/json" in order[1]
    assert told == [("create", "a", True), ("start", "a", True), ("start", "a", False)]


async def test_gap_is_replayed_from_the_last_event_without_repeating_it(engine: Engine) -> None:
    """After the stream broke, it is resumed at the last event's time; the engine's repetition of that is dropped."""
    at = 2**62
    first, twin, later = message("start", A, at), message("start", B, at), message("die", A, at + 1)
    engine.containers = [entry(A), entry(B)]
    async with Following(engine, 60) as following:
        await following.next(4)
        engine.tell(first)
        assert await following.next() == [("start", "a", False)]
        engine.history = [first, twin, later]
        engine.end_stream()
        told = await following.next(2)

    assert told == [("start", "b", False), ("die", "a", False)]
    resumed = [request for request in engine.requests if "/events" in request][1]
    assert f"since={since(at)}" in resumed


async def test_what_happened_in_a_gap_the_engine_forgot_is_told(engine: Engine) -> None:
    """A daemon that remembers nothing of the gap is compared with: ends and starts are told, once each."""
    engine.containers = [entry(A)]
    async with Following(engine, 60) as following:
        await following.next(2)
        engine.containers = [entry(B)]
        engine.end_stream()
        told = await following.next(3)
        await asyncio.to_thread(engine.subscribed.acquire)
        await asyncio.to_thread(engine.subscribed.acquire)
        # Nothing else was told before this one.
        engine.tell(message("die", B, 2**62))
        assert await following.next() == [("die", "b", False)]

    assert told == [("destroy", "a", True), ("create", "b", True), ("start", "b", True)]
    assert following.changes[-1] == ""
    assert "ended the stream" in following.changes[0]


async def test_differences_are_found_while_the_stream_is_quiet(engine: Engine) -> None:
    """The regular comparison tells what no event said."""
    async with Following(engine, 0.05) as following:
        await asyncio.to_thread(engine.subscribed.acquire)
        engine.containers = [entry(A)]
        assert await following.next(2) == [("create", "a", True), ("start", "a", True)]
        engine.containers = []
        assert await following.next() == [("destroy", "a", True)]


async def test_malformed_message_is_counted_and_passed_over(engine: Engine) -> None:
    """A message that is none does not end the stream."""
    async with Following(engine, 60) as following:
        await asyncio.to_thread(engine.subscribed.acquire)
        engine.tell(b'{"Type": 1}')
        engine.tell(message("start", A))

        assert await following.next() == [("start", "a", False)]
        assert following.feeder.statistics()["malformed"] == 1


async def test_engine_that_cannot_list_is_tried_again(engine: Engine) -> None:
    """A failing list is a failing connection: nothing is told from a half, and the next try tells all."""
    engine.behaviours["/containers/json"] = said(500, {"message": "not now"})
    async with Following(engine, 60) as following:
        async with asyncio.timeout(20):
            while not following.changes:
                await asyncio.sleep(0)
        assert following.events.empty()
        assert not following.feeder.following.is_set()
        engine.containers = [entry(A)]
        engine.behaviours["/containers/json"] = lambda request: request.answer(200, engine.containers)
        assert await following.next(2) == [("create", "a", True), ("start", "a", True)]
        assert following.feeder.following.is_set()
