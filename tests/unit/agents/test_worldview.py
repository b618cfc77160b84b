"""The world as the bus told of it: transitions one by one, and any history that ends with a list."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from clawker_cp.agents.world_messages import (
    AgentChanged,
    AgentEntry,
    AgentForgotten,
    ContainerChange,
    ContainerConnected,
    ContainerDestroyed,
    ContainerDied,
    ContainerDisconnected,
    ContainerEntry,
    ContainerPaused,
    ContainerRenamed,
    ContainerSeen,
    ContainersListed,
    SessionChanged,
    SessionEnded,
    SessionEntry,
    SessionState,
)
from clawker_cp.agents.worldview import Snapshot, Worldview
from clawker_cp.runtime.overseer import Overseer

A = ContainerEntry("a", name="one", project="shop", agent="dev", address="198.51.100.7")
ENROLLED = AgentEntry("a", enrolled=True, policy=3)
CONNECTED = SessionEntry("a", SessionState.CONNECTED, connected_at_unix=5)


class World:
    """A worldview on a bus, the way it is written."""

    def __init__(self, capacity: int = 100) -> None:
        self.overseer = Overseer()
        self.view = Worldview(capacity)
        self.overseer.attach(self.view)

    def tell(self, *messages: Any) -> World:
        for message in messages:
            self.overseer.publish(message)
        assert self.overseer.statistics().failed == 0
        return self

    def has(self, **changes: Any) -> bool:
        return self.view.container("a") == msgspec.structs.replace(A, **changes)


@pytest.fixture
def world() -> World:
    return World().tell(ContainerSeen(A))


def test_found_by_id(world: World) -> None:
    """And by nothing else; another container of the same agent and address is another entry."""
    twin = msgspec.structs.replace(A, id="b")
    world.tell(ContainerSeen(twin))
    assert [world.view.container(one) for one in ("a", "b", "c", "")] == [A, twin, None, None]


@pytest.mark.parametrize(
    ("messages", "changes"),
    [
        ([ContainerDied("a")], {"running": False, "address": ""}),
        ([ContainerDied("a"), ContainerDied("a")], {"running": False, "address": ""}),
        ([ContainerDied("a"), ContainerSeen(A)], {}),
        ([ContainerRenamed("a", name="two")], {"name": "two"}),
        ([ContainerConnected("a", address="198.51.100.9")], {"address": "198.51.100.9"}),
        ([ContainerDisconnected("a")], {"address": ""}),
        ([ContainerPaused("a", paused=True)], {"paused": True}),
        ([ContainerPaused("a", paused=True), ContainerPaused("a", paused=False)], {}),
        ([ContainerPaused("a", paused=True), ContainerDied("a")], {"running": False, "address": ""}),
        ([ContainerDied("a"), ContainerConnected("a", address="198.51.100.9")], {"running": False, "address": ""}),
        ([ContainerDied("a"), ContainerRenamed("a", name="two")], {"running": False, "address": "", "name": "two"}),
    ],
)
def test_what_happens_to_a_container(world: World, messages: list[Any], changes: dict[str, Any]) -> None:
    """Each event changes its own field; one that does not run has no address and is not paused."""
    world.tell(*messages)
    assert world.has(**changes)
    assert world.view.statistics()["ignored"] == 0


@pytest.mark.parametrize(
    "message",
    [
        ContainerDied("x"),
        ContainerDestroyed("x"),
        ContainerRenamed("x", name="n"),
        ContainerConnected("x", address="198.51.100.9"),
        ContainerDisconnected("x"),
        ContainerPaused("x", paused=True),
        AgentChanged(AgentEntry("x")),
        SessionChanged(SessionEntry("x", SessionState.CONNECTING)),
    ],
)
def test_nothing_happens_to_what_is_not_known(world: World, message: Any) -> None:
    """It is ignored and counted, and the version stands."""
    before = world.view.snapshot()
    world.tell(message)
    assert world.view.snapshot() is before
    assert world.view.statistics()["ignored"] == 1


def test_a_new_life_has_nothing_of_the_old(world: World) -> None:
    """Destroyed and seen again: a container without agent and session."""
    world.tell(AgentChanged(ENROLLED), SessionChanged(CONNECTED))
    assert (world.view.agent("a"), world.view.session("a")) == (ENROLLED, CONNECTED)
    world.tell(ContainerDestroyed("a", time_ns=9))
    assert world.view.snapshot() == Snapshot(4, {}, {}, {})
    world.tell(ContainerSeen(A, time_ns=10))
    assert world.has()
    assert (world.view.agent("a"), world.view.session("a")) == (None, None)


def test_death_ends_the_session_and_keeps_the_agent(world: World) -> None:
    """It may be started again; a session cannot be with what does not run."""
    world.tell(AgentChanged(ENROLLED), SessionChanged(CONNECTED), ContainerDied("a"))
    assert (world.view.agent("a"), world.view.session("a")) == (ENROLLED, None)
    world.tell(SessionChanged(CONNECTED))
    assert (world.view.session("a"), world.view.statistics()["ignored"]) == (None, 1)


def test_agents_and_sessions_are_forgotten_one_by_one(world: World) -> None:
    """Forgetting what is not there changes nothing."""
    world.tell(AgentChanged(ENROLLED), SessionChanged(CONNECTED), SessionEnded("a"), AgentForgotten("a"))
    version = world.view.version
    world.tell(SessionEnded("a"), AgentForgotten("a"))
    assert (world.view.agent("a"), world.view.session("a"), world.view.version) == (None, None, version)


def test_what_is_older_than_what_is_known_is_ignored() -> None:
    """A replay from before changes nothing; one without a time, or of the same time, is taken."""
    world = World().tell(ContainerSeen(A, time_ns=100))
    world.tell(ContainerDied("a", time_ns=99), ContainerDestroyed("a", time_ns=50), ContainerSeen(A, time_ns=1))
    assert world.has()
    assert world.view.statistics()["ignored"] == 3
    world.tell(ContainerRenamed("a", name="two", time_ns=100), ContainerDied("a"))
    assert world.has(name="two", running=False, address="")


def test_a_list_is_the_truth_but_for_what_happened_since() -> None:
    """What it lacks is gone, what it has is so; what is known to be later than the list stays."""
    b, c, d = (msgspec.structs.replace(A, id=one, address=f"198.51.100.{n}") for n, one in enumerate("bcd", 20))
    world = World().tell(ContainerSeen(A, time_ns=10), ContainerSeen(b, time_ns=10), ContainerSeen(c, time_ns=30))
    world.tell(ContainersListed((msgspec.structs.replace(A, name="new"), d), as_of_ns=20))
    assert world.has(name="new")
    assert dict(world.view.snapshot().containers) == {"a": msgspec.structs.replace(A, name="new"), "c": c, "d": d}
    world.tell(ContainerDied("a", time_ns=15))
    assert world.has(name="new")
    world.tell(ContainersListed(()))
    assert world.view.statistics()["containers"] == 0


def test_a_list_that_tells_nothing_new_changes_nothing(world: World) -> None:
    """The version stands, so nobody looks again for nothing."""
    before = world.view.snapshot()
    world.tell(ContainersListed((A,), as_of_ns=10**18), ContainerSeen(A))
    assert world.view.snapshot() is before


def test_it_is_bounded() -> None:
    """What has no room is refused and counted, and so is what belongs to it; a list makes room first."""
    world = World(capacity=2)
    entries = [ContainerEntry(str(n)) for n in range(4)]
    world.tell(*(ContainerSeen(one, time_ns=5) for one in entries), AgentChanged(AgentEntry("3")))
    assert world.view.statistics() == {
        "version": 2,
        "containers": 2,
        "agents": 0,
        "sessions": 0,
        "ignored": 1,
        "refused": 2,
    }
    world.tell(ContainersListed(tuple(entries[2:])))
    assert sorted(world.view.snapshot().containers) == ["2", "3"]
    assert set(world.view._times_ns) == {"2", "3"}


def test_a_snapshot_never_changes(world: World) -> None:
    """What was taken stays as it was, cannot be written, and is the same object while nothing changes."""
    before = world.view.snapshot()
    world.tell(ContainerDied("a"))
    assert before.containers["a"] == A
    assert world.view.snapshot().version == before.version + 1
    taken: Any = before.containers
    with pytest.raises(TypeError):
        taken["b"] = A


def test_a_change_it_does_not_know_is_told() -> None:
    """A new kind of change without a meaning here fails loudly and changes nothing."""

    class Strange(ContainerChange, frozen=True):
        pass

    view = Worldview()
    view.apply(ContainerSeen(A))
    with pytest.raises(TypeError, match="Strange"):
        view.apply(Strange("a"))
    assert view.container("a") == A


IDS = st.sampled_from("abcde")
ADDRESSES = st.sampled_from([f"198.51.100.{n}" for n in range(1, 5)])
FATES = st.sampled_from(["once", "once", "once", "lost", "twice", "late"])


class Engine(RuleBasedStateMachine):
    """
    An engine whose events are lost, doubled and late, and the view of whoever hears them.

    The engine's own state is the model; only a list has to bring the view to it.
    """

    CAPACITY = 4

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.CAPACITY)
        self.real: dict[str, ContainerEntry] = {}
        self.now = 0
        self.late: list[Any] = []
        self.taken: list[tuple[Snapshot, Snapshot]] = []
        self.version = 0

    def happens(self, fate: str, message: Any) -> None:
        if fate == "late":
            self.late.append(message)
        elif fate != "lost":
            self.world.tell(message)
            if fate == "twice":
                self.world.tell(message)

    def tick(self) -> int:
        self.now += 1
        return self.now

    @rule(one=IDS, address=ADDRESSES, fate=FATES)
    def start(self, one: str, address: str, fate: str) -> None:
        if one in self.real or len(self.real) < self.CAPACITY:
            self.real[one] = ContainerEntry(one, name=one, project="p", agent=one, address=address)
            self.happens(fate, ContainerSeen(self.real[one], self.tick()))

    @rule(one=IDS, fate=FATES)
    def die(self, one: str, fate: str) -> None:
        if one in self.real:
            self.real[one] = msgspec.structs.replace(self.real[one], running=False, address="", paused=False)
        self.happens(fate, ContainerDied(one, self.tick()))

    @rule(one=IDS, fate=FATES)
    def destroy(self, one: str, fate: str) -> None:
        self.real.pop(one, None)
        self.happens(fate, ContainerDestroyed(one, self.tick()))

    @rule(one=IDS, name=st.sampled_from(["n1", "n2"]), fate=FATES)
    def rename(self, one: str, name: str, fate: str) -> None:
        if one in self.real:
            self.real[one] = msgspec.structs.replace(self.real[one], name=name)
            self.happens(fate, ContainerRenamed(one, self.tick(), name=name))

    @rule(one=IDS, address=st.none() | ADDRESSES, paused=st.booleans(), fate=FATES)
    def move(self, one: str, address: str | None, paused: bool, fate: str) -> None:
        if one in self.real and self.real[one].running:
            self.real[one] = msgspec.structs.replace(self.real[one], address=address or "", paused=paused)
            time_ns = self.tick()
            self.happens(fate, ContainerPaused(one, time_ns, paused=paused))
            connected = ContainerConnected(one, time_ns, address=address) if address else None
            self.happens(fate, connected or ContainerDisconnected(one, time_ns))

    @rule(one=IDS, fate=FATES, state=st.sampled_from(SessionState))
    def converse(self, one: str, fate: str, state: SessionState) -> None:
        self.happens(fate, AgentChanged(AgentEntry(one, enrolled=True)))
        self.happens(fate, SessionChanged(SessionEntry(one, state)))

    @rule(which=st.randoms(use_true_random=False))
    def deliver_late(self, which: Any) -> None:
        if self.late:
            self.world.tell(self.late.pop(which.randrange(len(self.late))))

    @rule()
    def take(self) -> None:
        snapshot = self.world.view.snapshot()
        copy = Snapshot(snapshot.version, dict(snapshot.containers), dict(snapshot.agents), dict(snapshot.sessions))
        self.taken.append((snapshot, copy))

    @rule(timed=st.booleans())
    def reconcile(self, timed: bool) -> None:
        """Whatever was heard until now: a list brings the view to the engine's state, and a second changes nothing."""
        listing = ContainersListed(tuple(self.real.values()), self.now if timed else 0)
        self.world.tell(listing)
        assert dict(self.world.view.snapshot().containers) == self.real
        version = self.world.view.version
        self.world.tell(listing)
        assert self.world.view.version == version

    @invariant()
    def it_is_consistent_and_bounded(self) -> None:
        view, shown = self.world.view, self.world.view.snapshot()
        containers = shown.containers
        assert len(containers) <= self.CAPACITY
        assert set(shown.agents) <= set(containers) == set(view._times_ns)
        assert set(shown.sessions) <= {one.id for one in containers.values() if one.running}
        for one in containers.values():
            assert view.container(one.id) == one
            assert one.running or not one.address

    @invariant()
    def its_history_is_one(self) -> None:
        assert self.world.view.version >= self.version
        self.version = self.world.view.version
        assert all(snapshot == copy for snapshot, copy in self.taken)


Engine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestEngine = Engine.TestCase


class Timely(Engine):
    """Events that all come, in their order but as often as you like: the view needs no list."""

    def happens(self, fate: str, message: Any) -> None:
        self.world.tell(message)
        if fate == "twice":
            self.world.tell(message, message)

    @invariant()
    def it_is_the_engines_state(self) -> None:
        assert dict(self.world.view.snapshot().containers) == self.real


Timely.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestTimely = Timely.TestCase
