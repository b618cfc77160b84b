"""What root takes away below the pin directory is seen and put back; what cannot be is said with its cause."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clawker_cp._fast import bpfmap
from clawker_cp.ebpf.attachments import ATTACH
from clawker_cp.ebpf.manager import Manager
from clawker_cp.testing.socket_world import remove_cgroup
from clawker_cp.testing.world import cgroup2_mount

pytestmark = pytest.mark.root

ALL = len(ATTACH)


class Place:
    """A loaded manager with an agents' parent and one container of its own cgroup."""

    def __init__(self) -> None:
        self.name = f"ckg{os.getpid()}-{secrets.token_hex(2)}"
        self.pins = Path("/sys/fs/bpf") / self.name
        self.parent = self.cgroup("parent")
        self.box = self.cgroup("engine/box")
        self.manager = Manager(self.pins, max_agents=64)
        self.manager.load(self.parent)
        self.number = self.manager.attach(self.box)

    def cgroup(self, path: str) -> Path:
        made = cgroup2_mount() / self.name / path
        made.mkdir(parents=True, exist_ok=True)
        return made

    def link(self, program: str = "clawker_connect4", *, of_box: bool = False) -> Path:
        return self.pins / "links" / (str(self.number) if of_box else "") / program

    @property
    def faults(self) -> list[str]:
        return self.manager.mender.faults()


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    try:
        assert made.faults == [] == made.manager.mender.mend()
        yield made
    finally:
        made.manager.flush(force=True)
        for directory, _names, _files in os.walk(cgroup2_mount() / made.name, topdown=False):
            remove_cgroup(Path(directory))


def detach(pinned: Path) -> None:
    """Let a link go while its pin stays."""
    link = bpfmap.open_pinned(str(pinned))
    try:
        assert ctypes.CDLL("libbpf.so.1", use_errno=True).bpf_link_detach(link) == 0
    finally:
        os.close(link)


def give_another_program(place: Place) -> None:
    """What attaches anew does: programs of the same name, which are not the ones we loaded."""
    other = bpfmap.BpfObject.load(
        str(Path(bpfmap.__file__).parent.parent / "_bpf" / "clawker.bpf.o"), pin_dir=None, agent_level=9, max_agents=1
    )
    link = bpfmap.open_pinned(str(place.link()))
    bpfmap.replace(link, other.program_fd("clawker_connect4"))
    os.close(link)
    other.close()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda place: place.link().unlink(), "is not judged by clawker_connect4"),
        (lambda place: detach(place.link("clawker_egress")), "is not judged by clawker_egress"),
        (give_another_program, "is not judged by clawker_connect4"),
        (lambda place: place.link(of_box=True).unlink(), "engine/box is not judged by clawker_connect4"),
        (lambda place: detach(place.link("clawker_egress", of_box=True)), "engine/box is not judged by clawker_egress"),
        (lambda place: shutil.rmtree(place.pins / "links" / str(place.number)), f"and {ALL - 1} more"),
        (lambda place: shutil.rmtree(place.pins / "links"), f"and {ALL - 1} more"),
        (lambda place: (place.pins / "container_map").unlink(), "container_map is not pinned"),
        (lambda place: shutil.rmtree(place.pins), "parent is not judged by clawker_egress and"),
    ],
    ids=["pin", "link", "program", "box-pin", "box-link", "box-directory", "links", "map", "everything"],
)
@pytest.mark.slow
def test_what_was_taken_away_is_put_back(place: Place, damage: Callable[[Place], None], says: str) -> None:
    """It is named before, and afterwards nothing is missing, for this process and for the next start."""
    damage(place)
    assert says in "\n".join(place.faults)

    assert place.manager.mender.mend() == []

    assert place.faults == []
    assert place.pins.stat().st_mode & 0o777 == 0o700
    place.manager.close()
    report = place.manager.load(place.parent)
    assert (report.adopted, report.replaced, report.attached) == (True, False, 1)
    assert place.faults == []


def test_what_is_in_the_way_is_named(place: Place) -> None:
    """Something else in a pin's place stays a fault with its cause until it is removed."""
    for of_box in (False, True):
        place.link(of_box=of_box).unlink()
        place.link(of_box=of_box).mkdir()
    left = place.manager.mender.mend()
    assert len(left) == len(place.faults) == 2
    assert all("clawker_connect4" in fault and "ermission" in fault for fault in left), left
    for of_box in (False, True):
        place.link(of_box=of_box).rmdir()
    assert place.manager.mender.mend() == [] == place.faults


def test_a_parent_made_again_is_judged_again(place: Place) -> None:
    """A parent cgroup that somebody removed is a fault; another one at its place gets every program."""
    remove_cgroup(place.parent)
    assert "there is no cgroup" in place.manager.mender.mend()[0]
    place.cgroup("parent")
    assert "parent is not judged by" in place.faults[0]
    assert place.manager.mender.mend() == [] == place.faults
    place.cgroup("parent/agent")
    assert place.manager.attach(place.parent / "agent") == (place.parent / "agent").stat().st_ino


def test_an_earlier_parent_whose_path_is_not_known_is_a_fault(place: Place) -> None:
    """Agents below a parent that this run does not name stay judged; what they lose is said with the way out."""
    place.manager.close()
    place.manager.load(None)
    assert place.faults == []
    place.link().unlink()
    (left,) = place.manager.mender.mend()
    assert "host.cgroup_parent" in left and "clawker_connect4" in left
    remove_cgroup(place.parent)  # with nobody below it there is nothing to judge
    while place.manager.mender.faults():  # the kernel takes a moment; the time limit ends it
        assert place.manager.mender.mend() in ([left], [])


def test_dead_containers_are_not_missed(place: Place) -> None:
    """Links that go with their cgroup are no fault."""
    place.manager.detach(place.number)
    place.manager.attach(place.box)
    remove_cgroup(place.box)
    while place.faults:  # the kernel takes a moment; the time limit ends it
        pass
    assert place.manager.mender.mend() == []


def test_a_map_that_takes_no_rows_is_a_fault(place: Place) -> None:
    """Frozen from outside it still enforces what is in it, and is not called well."""
    descriptor = bpfmap.open_pinned(str(place.pins / "container_map"))
    try:
        assert ctypes.CDLL("libbpf.so.1", use_errno=True).bpf_map_freeze(descriptor) == 0
    finally:
        os.close(descriptor)
    assert place.faults == place.manager.mender.mend()
    assert place.faults[0].startswith("container_map takes no rows")


def test_nothing_is_put_back_behind_a_flush(place: Place) -> None:
    """What was given back is not missed, and a flush leaves nothing."""
    place.manager.flush(force=True)
    assert place.manager.mender.mend() == []
    assert not place.pins.exists()
    assert place.faults == ["the programs are not attached"]
