"""Which links are made, kept, given new programs and removed; who is refused."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from clawker_cp._fast import bpfmap
from clawker_cp.ebpf.attachments import ATTACH, CGROUP
from clawker_cp.ebpf.config import AgentConfig
from clawker_cp.ebpf.manager import Manager
from clawker_cp.errors import Conflict, InvalidInput, NotFound, Unavailable
from clawker_cp.testing.bpf_abi import root
from clawker_cp.testing.socket_world import remove_cgroup
from clawker_cp.testing.world import cgroup2_mount

pytestmark = pytest.mark.root

WHOLE = sorted(name for name, _ in ATTACH)
CONFIG = AgentConfig(3, "198.51.100.2", "198.51.100.3", "198.51.100.4", "198.51.100.5")


class Place:
    """Cgroups and a pin directory of this test's own, and managers one after the other."""

    def __init__(self) -> None:
        self.name = f"cka{os.getpid()}-{secrets.token_hex(2)}"
        self.pins = Path("/sys/fs/bpf") / self.name
        self.parent = self.cgroup("parent")
        self.manager = Manager(self.pins, max_agents=64)

    def cgroup(self, path: str) -> Path:
        made = cgroup2_mount() / self.name / path
        made.mkdir(parents=True, exist_ok=True)
        return made

    def again(self, parent: Path | None) -> None:
        self.manager.close()
        self.manager.load(parent)

    def links(self, cgroup_id: int | None = None) -> list[str]:
        directory = self.pins / "links" / ("" if cgroup_id is None else str(cgroup_id))
        found = directory.iterdir() if directory.exists() else ()
        return sorted(path.name for path in found if path.name != CGROUP and not path.is_dir())


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    try:
        yield made
    finally:
        made.manager.flush(force=True)
        for directory, _names, _files in os.walk(cgroup2_mount() / made.name, topdown=False):
            remove_cgroup(Path(directory))


@pytest.fixture
def loaded(place: Place) -> Place:
    place.manager.load(place.parent)
    return place


@contextmanager
def inhabited(cgroup: Path) -> Iterator[None]:
    """A process lives in the cgroup."""
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        yield
    finally:
        process.communicate()


def test_a_container_gets_the_whole_set_once(loaded: Place) -> None:
    """The id is the kernel's, asking again changes nothing, and a link that went missing is made again."""
    box = loaded.cgroup("engine/box")
    number = loaded.manager.attach(box)
    assert number == box.stat().st_ino == loaded.manager.attach(box)
    assert (loaded.links(number), loaded.manager.attached()) == (WHOLE, {number})
    (loaded.pins / "links" / str(number) / "clawker_egress").unlink()
    loaded.manager.attach(box)
    assert loaded.links(number) == WHOLE


@pytest.mark.parametrize(
    ("cgroup", "category", "words"),
    [
        (lambda place: place.parent, Conflict, "not directly below"),
        (lambda place: place.cgroup("parent/slice/box"), Conflict, "not directly below"),
        (lambda place: place.parent.parent, Conflict, "above the agents' parent"),
        (lambda place: place.cgroup("engine/box/inner"), Conflict, "inside the agent"),
        (lambda place: place.parent / "missing", NotFound, "there is no cgroup"),
        (lambda _place: cgroup2_mount(), InvalidInput, "below the root"),
        (lambda _place: Path("/tmp"), InvalidInput, "is no cgroup"),
        (lambda place: place.parent / "cgroup.procs", InvalidInput, "no directory"),
    ],
)
def test_what_is_no_container_is_refused(
    loaded: Place, cgroup: Callable[[Place], Path], category: type[Exception], words: str
) -> None:
    """A cgroup that the programs would know as somebody else, or that is none, gets no link."""
    box = loaded.manager.attach(loaded.cgroup("engine/box"))
    with pytest.raises(category, match=words):
        loaded.manager.attach(cgroup(loaded))
    assert loaded.manager.attached() == {box}
    assert sorted(path.name for path in (loaded.pins / "links").iterdir() if path.is_dir()) == [str(box)]


def test_the_control_planes_own_cgroup_is_refused(loaded: Place) -> None:
    """A cgroup that we run in ourselves is not attached: we would be denied everything."""
    own = loaded.cgroup("own/inner")
    home = cgroup2_mount() / Path("/proc/self/cgroup").read_text().split("0::")[1].splitlines()[0].lstrip("/")
    (own / "cgroup.procs").write_text(str(os.getpid()))
    try:
        for cgroup in (own, own.parent):
            with pytest.raises(Conflict, match="itself runs"):
                loaded.manager.attach(cgroup)
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
    assert loaded.manager.attached() == set()


def test_around_an_attached_one_it_is_attached_as_well(loaded: Place) -> None:
    """A container that holds an attached cgroup is not left unjudged: both sets of programs have to agree."""
    inner = loaded.manager.attach(loaded.cgroup("box/inner"))
    outer = loaded.manager.attach(loaded.cgroup("box"))
    assert loaded.manager.attached() == {inner, outer}


@pytest.mark.slow
def test_without_a_parent_containers_are_attached_all_the_same(place: Place) -> None:
    """No parent, no links to one; rows and containers work, and the next run finds them."""
    report = place.manager.load(None)
    number = place.manager.attach(place.cgroup("engine/box"))
    place.manager.enroll(number, CONFIG)
    assert (report.attached, place.links(), place.links(number)) == (0, [], WHOLE)
    place.again(None)
    assert (place.manager.attached(), set(place.manager.agents())) == ({number}, {number})


@pytest.mark.slow
def test_a_parent_that_is_not_named_any_more_stays(loaded: Place) -> None:
    """Agents below an earlier parent keep being judged there when the next run names none."""
    loaded.again(None)
    assert loaded.links() == WHOLE
    direct = loaded.cgroup("parent/direct")
    assert loaded.manager.attach(direct) == direct.stat().st_ino
    assert loaded.manager.attached() == set()


@pytest.mark.slow
def test_another_parent_is_refused_while_agents_live_below_the_earlier(loaded: Place) -> None:
    """A changed setting never leaves living agents unjudged; with none left it takes effect."""
    other, agent = loaded.cgroup("other"), loaded.cgroup("parent/agent")
    with inhabited(agent):
        loaded.manager.close()
        with pytest.raises(Conflict, match="earlier parent"):
            loaded.manager.load(other)
        assert loaded.links() == WHOLE
    remove_cgroup(agent)
    loaded.again(other)
    direct = loaded.cgroup("other/direct")
    loaded.manager.attach(direct)
    assert (loaded.links(), loaded.manager.attached()) == (WHOLE, set())


@pytest.mark.slow
def test_a_container_that_a_new_parent_judges_loses_its_own_links(place: Place) -> None:
    """Once the parent's programs know it by the same id, its own set would judge what the first redirected."""
    place.manager.load(None)
    number = place.manager.attach(place.cgroup("parent/box"))
    place.again(place.parent)
    assert (place.links(), place.links(number), place.manager.attached()) == (WHOLE, [], set())


@pytest.mark.slow
def test_a_dead_containers_links_go_with_the_next_load(loaded: Place) -> None:
    """What was removed while nobody ran leaves no pin behind."""
    box = loaded.cgroup("engine/box")
    number = loaded.manager.attach(box)
    loaded.manager.close()
    remove_cgroup(box)
    report = loaded.manager.load(loaded.parent)
    assert report.attached == 0
    while (loaded.pins / "links" / str(number)).exists():  # the kernel takes a moment; the time limit ends it
        loaded.manager.collect_garbage()
    assert loaded.manager.statistics()["leaving"] == 0


def test_detaching_needs_an_empty_cgroup(loaded: Place) -> None:
    """It is refused while a process lives in it or below it; the links of an empty one stay until it is removed."""
    box = loaded.cgroup("engine/box")
    number = loaded.manager.attach(box)
    with inhabited(loaded.cgroup("engine/box/inner")):
        with pytest.raises(Conflict, match="still has processes"):
            loaded.manager.detach(number)
        with pytest.raises(Conflict, match="still have processes, the first is .*/engine/box"):
            loaded.manager.flush()
    loaded.manager.detach(number)
    loaded.manager.detach(number)
    assert (loaded.manager.attached(), loaded.links(number)) == (set(), WHOLE)
    assert loaded.manager.attach(box) == number
    assert (loaded.manager.attached(), loaded.manager.statistics()["leaving"]) == ({number}, 0)


def test_flushing_asks_the_pins(loaded: Place) -> None:
    """A manager that loaded nothing refuses to flush under a living container too, and leaves nothing afterwards."""
    box = loaded.cgroup("engine/box")
    loaded.manager.attach(box)
    loaded.manager.close()
    with inhabited(box), pytest.raises(Conflict, match="still have processes"):
        loaded.manager.flush()
    loaded.manager.flush()
    assert not loaded.pins.exists()


def test_a_flush_while_programs_load_leaves_nothing_pinned(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the container they are loaded for, nor by one that waits for its turn."""
    load, begun, go_on = Manager._load_object, threading.Event(), threading.Event()
    attaching: list[threading.Thread] = []

    def gated(manager: Manager, level: int) -> bpfmap.BpfObject:
        if threading.current_thread() in attaching:
            begun.set()
            assert go_on.wait(10)
        return load(manager, level)

    def attach(cgroup: Path) -> None:
        with suppress(Unavailable):
            place.manager.attach(cgroup)

    monkeypatch.setattr(Manager, "_load_object", gated)
    place.manager = Manager(place.pins, max_agents=64)
    place.manager.load(place.parent)
    cgroups = [place.cgroup("deep/in/one"), place.cgroup("deeper/in/the/other")]
    attaching += [threading.Thread(target=attach, args=(cgroup,)) for cgroup in cgroups]
    flushing = threading.Thread(target=place.manager.flush)
    for thread in attaching:
        thread.start()
    assert begun.wait(10)
    flushing.start()
    flushing.join(0.2)  # as far as it gets
    go_on.set()
    for thread in (*attaching, flushing):
        thread.join(10)

    assert not place.pins.exists()


def test_the_manual_lists_every_pin(loaded: Place) -> None:
    """docs/bpf.md has a row for each kind of pin, with who removes it, and none for what is not pinned."""
    number = loaded.manager.attach(loaded.cgroup("engine/box"))
    programs = "|".join(WHOLE)
    kinds = set()
    for path in loaded.pins.rglob("*"):
        name = str(path.relative_to(loaded.pins)).replace(str(number), "<cgroup id>")
        if path.is_symlink() or not path.is_dir():
            kinds.add(re.sub(rf"({programs})$", "<program>", name) if "/" in name else "<map>")
    manual = (root() / "docs/bpf.md").read_text().split("\n## Pins\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]+) \|$", manual, re.M)
    assert {pin for pin, remover in rows if remover.strip()} == kinds


def test_nothing_is_attached_before_the_load(place: Place) -> None:
    """Attaching without programs is said, and detaching has nothing to do."""
    with pytest.raises(Unavailable, match="not loaded"):
        place.manager.attach(place.parent)
    place.manager.detach(place.parent.stat().st_ino)
    assert place.manager.attached() == set()
