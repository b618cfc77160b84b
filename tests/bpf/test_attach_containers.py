"""Real sockets in containers that are not below the agents' parent: programs of their own, at every depth."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from clawker_cp.ebpf import attachments
from clawker_cp.ebpf.config import NameRow, mapped
from clawker_cp.ebpf.manager import Manager
from clawker_cp.errors import Conflict
from clawker_cp.firewall.plan import TCP
from clawker_cp.testing.sandbox_world import until
from clawker_cp.testing.socket_world import (
    CONFIG,
    GATEWAY,
    OTHER,
    TARGET,
    Actor,
    SocketWorld,
    cgroup_id,
    remove_cgroup,
)
from clawker_cp.testing.world import cgroup2_mount

pytestmark = pytest.mark.root

HTTPS, NAME = 443, 300
LIMIT_S = 10.0
PROGRAMS = len(attachments.ATTACH)


def attached(world: SocketWorld, depth: int = 2, **kept: Any) -> Actor:
    """A container that is attached and not enrolled, with one process."""
    cgroup = world.container(depth)
    assert world.manager.attach(cgroup) == cgroup_id(cgroup)
    return world.actor(cgroup, **kept)


def enrolled(world: SocketWorld, depth: int = 2, **kept: Any) -> Actor:
    """The same, enrolled, and told TARGET's name."""
    agent = attached(world, depth, **kept)
    world.manager.enroll(cgroup_id(agent.cgroup), CONFIG)
    world.knows(agent, TARGET, NAME)
    world.route(NAME, HTTPS, TCP, 10001)
    world.apply()
    return agent


def links_of(world: SocketWorld, number: int) -> list[str]:
    directory = Path("/sys/fs/bpf") / world.prefix / "links" / str(number)
    return sorted(path.name for path in directory.iterdir() if path.name != "cgroup") if directory.exists() else []


@contextmanager
def hammered(agent: Actor) -> Iterator[list[str]]:
    """Denied connects and datagrams, over and over beside the test; what they failed with ("" = it worked)."""
    seen: list[str] = []
    done = threading.Event()

    def hammer() -> None:
        datagram = agent.udp()
        while not done.is_set():
            handle = agent.tcp()
            seen.append(agent.error("connect", handle, OTHER, 5000))
            seen.append(agent.error("sendto", datagram, "x", OTHER, 5000))
            agent("close", handle)

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join(LIMIT_S)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_attached_without_a_row_reaches_nothing(world: SocketWorld, depth: int) -> None:
    """A container that is attached and not enrolled reaches nothing, not even itself, at every depth (I4)."""
    early = attached(world, depth)

    for addr, port in ((TARGET, HTTPS), (GATEWAY, 7444), ("8.8.8.8", 53), ("127.0.0.1", 80)):
        assert early.error("connect", early.tcp(), addr, port) == "EACCES"
        assert early.error("sendto", early.udp(), "x", addr, port) == "EACCES"
    assert set(world.decisions()) <= {"denied not_enrolled"}
    assert world.arrived() == []


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_its_row_holds_for_everything_inside_it(world: SocketWorld, depth: int) -> None:
    """Enrolled, it and the cgroups inside it are that agent: what its policy allows works, nothing else."""
    agent = enrolled(world, depth)
    deeper = world.actor(world.inside(agent.cgroup, "inner/most"))

    for actor in (agent, deeper):
        assert actor.dial(TARGET, HTTPS) == f"{GATEWAY}|10001|hello"
        assert actor.error("connect", actor.tcp(), OTHER, HTTPS) == "ECONNREFUSED"
    assert {event.cgroup_id for event in world.events()} == {cgroup_id(agent.cgroup)}


def test_loopback_is_its_own(world: SocketWorld) -> None:
    """Its loopback works between it and a cgroup inside it, and does not lead to another's receiver (threat 33)."""
    agent, other = enrolled(world), enrolled(world)
    deeper = world.actor(world.inside(agent.cgroup, "inner"))
    for port, actor in ((6200, deeper), (6201, other)):
        handle = actor.udp()
        actor("bind", handle, "127.0.0.1", port)

    agent("sendto", agent.udp(), "x", "127.0.0.1", 6200)
    assert agent.error("sendto", agent.udp(), "x", "127.0.0.1", 6201) == "EPERM"


def test_connections_from_before_are_judged(world: SocketWorld) -> None:
    """A connection that was made before the programs were attached carries no further byte (threat 8)."""
    cgroup = world.container()
    early = world.actor(cgroup)
    stream, datagram = early.tcp(), early.udp()
    early("connect", stream, OTHER, 5000)
    early("connect", datagram, OTHER, 5000)
    world.manager.attach(cgroup)
    world.arrived()
    early("send", stream, "after")

    assert early.error("send", datagram, "after") == "EPERM"
    assert early.error("receive", stream, 0.2) == "TIMEOUT"
    assert world.arrived() == []


def test_below_the_parent_it_is_judged_there(world: SocketWorld) -> None:
    """Directly below the agents' parent nothing is linked twice; deeper it is refused, and reaches nothing."""
    direct, deep = world.cgroup(), world.cgroup("slice/box")
    actor = world.actor(deep)

    assert world.manager.attach(direct) == cgroup_id(direct)
    with pytest.raises(Conflict, match="not directly below"):
        world.manager.attach(deep)
    world.manager.enroll(cgroup_id(deep), CONFIG)
    assert world.manager.attached() == set()
    assert links_of(world, cgroup_id(direct)) == links_of(world, cgroup_id(deep)) == []
    assert actor.error("connect", actor.tcp(), GATEWAY, 7444) == "EACCES"


def test_living_containers_stay_attached(world: SocketWorld) -> None:
    """While it has processes a container cannot be detached, nor by withdrawing its row: it is denied everything."""
    agent = enrolled(world)
    number = cgroup_id(agent.cgroup)
    agent.tcp()  # it has started

    with pytest.raises(Conflict, match="still has processes"):
        world.manager.detach(number)
    world.manager.withdraw(number)
    assert agent.error("connect", agent.tcp(), TARGET, HTTPS) == "EACCES"
    assert number in world.manager.attached()
    with pytest.raises(Conflict, match="still have processes"):
        world.manager.flush()
    world.manager.detach(number + 10**6)


def test_a_dead_containers_sockets_are_still_judged(world: SocketWorld) -> None:
    """A socket that outlives its container, handed to an accomplice, stays closed; its end takes the links away."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent, accomplice = enrolled(world, channel=ends[0]), world.bystander(ends[1])
    agent("give", agent.udp())
    passed = accomplice("take")
    number = cgroup_id(agent.cgroup)
    for end in ends:
        end.close()
    agent.close()
    remove_cgroup(agent.cgroup)
    world.manager.withdraw(number)

    assert number not in world.manager.attached()
    assert accomplice.error("sendto", passed, "x", OTHER, 5000) == "EACCES"
    assert accomplice.error("connect", passed, OTHER, 5000) == "EACCES"
    world.manager.collect_garbage()
    assert len(links_of(world, number)) == PROGRAMS
    assert world.arrived() == []

    accomplice("close", passed)
    until(lambda: world.manager.collect_garbage() == 0 and not links_of(world, number), "the links went")


def test_adoption_opens_nothing_under_traffic(world: SocketWorld) -> None:
    """The next manager gives every container's links its programs while denied traffic runs, and none gets through."""
    agent = enrolled(world)
    number = cgroup_id(agent.cgroup)
    with hammered(agent) as seen:
        until(lambda: len(seen) > 5, "the traffic runs")
        world.manager.close()
        report = world.manager.load(world.parent)
        before = len(seen)
        until(lambda: len(seen) > before + 5, "it runs on")

    assert (report.adopted, report.attached) == (True, 1)
    assert world.manager.attached() == {number}
    assert set(seen) == {"ECONNREFUSED"}
    assert [line for line in world.arrived() if line[1] == OTHER] == []
    assert agent.dial(TARGET, HTTPS) == f"{GATEWAY}|10001|hello"


def test_other_layouts_are_replaced_and_open_nothing(world: SocketWorld) -> None:
    """Maps of another layout are replaced under a living container: denied until it is enrolled again, never open."""
    agent = enrolled(world)
    number = cgroup_id(agent.cgroup)
    other = Manager(Path("/sys/fs/bpf") / world.prefix, max_agents=128)
    world.manager.close()
    try:
        with hammered(agent) as seen:
            report = other.load(world.parent)
            before = len(seen)
            until(lambda: len(seen) > before + 5, "it runs on")
        assert (report.adopted, report.replaced, report.attached) == (False, True, 1)
        assert set(seen) <= {"ECONNREFUSED", "EACCES"}
        assert seen[-1] == "EACCES"
        other.enroll(number, CONFIG)
        later = time.monotonic_ns() + 10**11
        other.update_dns(number, [NameRow(mapped(TARGET), NAME, later)])
        other.sync_routes(world.routes, world.cidrs, world.ports)
        assert agent.dial(TARGET, HTTPS) == f"{GATEWAY}|10001|hello"
        assert [line for line in world.arrived() if line[1] == OTHER] == []
    finally:
        other.close()
        world.manager.load(world.parent)


def grown(seen: list[str], most: int) -> bool:
    return len(seen) > most


def killed_at(line: int, work: Callable[[], object]) -> bool:
    """Do something in a child that is killed at so many lines into attachments.py; False when it ended before."""
    child = os.fork()
    if child == 0:
        left = [line]

        def trace(frame: FrameType, event: str, _argument: object) -> Any:
            if frame.f_code.co_filename != attachments.__file__:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            work()
        finally:
            os._exit(0)
    _pid, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_while_attaching_is_finished_by_the_next_attach(world: SocketWorld) -> None:
    """Killed at any line, an attachment is completed by the next one, with each program linked once."""
    at, kills = 1, 0
    while True:
        cgroup = world.container()
        actor = world.actor(cgroup)
        if not killed_at(at, partial(world.manager.attach, cgroup)):
            break
        number = world.manager.attach(cgroup)
        assert len(links_of(world, number)) == PROGRAMS
        assert actor.error("connect", actor.tcp(), GATEWAY, 7444) == "EACCES"
        actor.close()
        at, kills = at + 7, kills + 1
    assert kills > 15


@pytest.mark.slow
@pytest.mark.parametrize("linked", [0, 1, 6, 11])
def test_a_kill_while_attaching_is_repaired_by_the_next_load(world: SocketWorld, linked: int) -> None:
    """Half an attachment that nobody asks for again is completed when the next manager loads."""
    at, cgroup = 30, world.container()
    directory = Path("/sys/fs/bpf") / world.prefix / "links"
    while len(links_of(world, cgroup_id(cgroup))) < linked or not (directory / f"{cgroup_id(cgroup)}/cgroup").exists():
        cgroup = world.container()
        assert killed_at(at, partial(world.manager.attach, cgroup))
        at += 1
    actor = world.actor(cgroup)
    number = cgroup_id(cgroup)
    assert len(links_of(world, number)) == linked
    world.manager.close()
    world.manager.load(world.parent)

    assert number in world.manager.attached()
    assert len(links_of(world, number)) == PROGRAMS
    assert actor.error("connect", actor.tcp(), GATEWAY, 7444) == "EACCES"


@pytest.mark.slow
def test_a_kill_while_adopting_opens_nothing(world: SocketWorld) -> None:
    """A load that is killed while it replaces programs leaves every hook with one, old or new."""
    agent = enrolled(world)
    world.manager.close()
    kills = 0
    try:
        with hammered(agent) as seen:
            for at in (20, 80, 150, 220):
                kills += killed_at(at, lambda: world.manager.load(world.parent))
                until(partial(grown, seen, len(seen) + 5), "it runs on")
    finally:
        world.manager.load(world.parent)
    assert kills == 4
    assert set(seen) == {"ECONNREFUSED"}
    assert len(links_of(world, cgroup_id(agent.cgroup))) == PROGRAMS
    assert agent.dial(TARGET, HTTPS) == f"{GATEWAY}|10001|hello"


def test_nothing_is_left_of_many_containers(world: SocketWorld) -> None:
    """Two hundred containers that come and go leave no link, no pin, no descriptor."""
    links = Path("/sys/fs/bpf") / world.prefix / "links"
    world.manager.attach(world.container(1))  # so that the programs of that level are loaded
    descriptors = len(os.listdir("/proc/self/fd"))
    cgroup = cgroup2_mount() / f"{world.prefix}-many"
    gone = set()
    for _ in range(200):
        cgroup.mkdir()
        try:
            number = world.manager.attach(cgroup)
            world.manager.enroll(number, replace(CONFIG, policy=2))
        finally:
            cgroup.rmdir()
        world.manager.withdraw(number)
        gone.add(number)

    assert not gone & world.manager.attached()
    until(
        lambda: world.manager.collect_garbage() == 0 and not any((links / str(one)).exists() for one in gone),
        "the kernel let go of all of them",
    )
    assert len(gone) == 200
    assert len(os.listdir("/proc/self/fd")) == descriptors
