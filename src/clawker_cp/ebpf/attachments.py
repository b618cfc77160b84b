"""
Which cgroups the programs are linked to: the agents' parent, and containers that are not below it.

A container brings programs of its own, loaded for its level. A link is only ever given a new
program; its pin goes when the kernel has let go of the cgroup, which the last socket holds. Until
then a dead agent's sockets are still judged, also those that it handed to others or left sending.
What somebody else takes away is linked again by `mend`.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import structlog

from clawker_cp._fast import bpfmap
from clawker_cp.ebpf.kernel_cgroups import KernelCgroups, Place
from clawker_cp.errors import ClawkerError, Conflict, InvalidInput, NotFound, Unavailable

log = structlog.get_logger()

# Attach types of <linux/bpf.h>, in the order they are attached: the backstop first.
ATTACH = (
    ("clawker_egress", 1),
    ("clawker_ingress", 0),
    ("clawker_connect4", 10),
    ("clawker_connect6", 11),
    ("clawker_sendmsg4", 14),
    ("clawker_sendmsg6", 15),
    ("clawker_recvmsg4", 19),
    ("clawker_recvmsg6", 20),
    ("clawker_getpeername4", 29),
    ("clawker_getpeername6", 30),
    ("clawker_sock_create", 2),
    ("clawker_setsockopt", 22),
)
# Where the path of a container's cgroup is kept beside its links, as a symbolic link: a load after a
# kill finishes half an attachment with it.
CGROUP = "cgroup"
# The level of /docker/<id>, of system.slice/docker-<id>.scope and of a child of a parent below the root.
USUAL_LEVEL = 2


class Attachments:
    """
    The links pinned below one directory. `load_object` loads the programs for agents at one level.

    Verbs may be called from any thread. The first `attach` at a level takes a second, others milliseconds.
    """

    def __init__(self, links: Path, load_object: Callable[[int], bpfmap.BpfObject], cgroups: KernelCgroups) -> None:
        self._links = links
        self._load_object = load_object
        self._cgroups = cgroups
        self._objects: dict[int, bpfmap.BpfObject] = {}
        self._parent: Place | None = None
        self._parent_path: Path | None = None
        self._attached: dict[int, str] = {}  # and where each is, as far as it is known
        self._leaving: set[int] = set()
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # takes a second for a new level: nobody else waits for that

    def first_object(self, parent: Place | None) -> bpfmap.BpfObject:
        """
        The programs for agents below `parent`, or for what an earlier run was attached to, or the usual ones.
        """
        self._cgroups.own()  # so that a kernel that cannot be asked says so now
        above = parent or self._earlier_parent()
        return self._object(above.level + 1 if above is not None else USUAL_LEVEL)

    def adopt(self, parent: Path | None, place: Place | None) -> None:
        """
        Link the programs to the parent and give every link of an earlier run the present programs.

        A parent that an earlier run had and this one does not name stays the parent. Raises `Conflict`
        when another one is named while agents live below the earlier one.
        """
        with self._loading, self._lock:
            self._adopt_parent(parent, place)
            for directory in self._directories():
                self._adopt_container(int(directory.name))

    def attach(self, cgroup: Path) -> int:
        """
        See to it that the programs judge a cgroup, and everything below it, as one agent; returns its id.
        """
        with _opened(cgroup) as descriptor:
            place = self._cgroups.find(os.fstat(descriptor).st_ino)
            if place is None:
                raise NotFound(f"the kernel has no cgroup {cgroup} any more")
            if not self._needs_links(place, cgroup):
                return place.id
            try:
                with self._loading:
                    self._require(loaded=bool(self._objects))
                    loaded = self._object(place.level)
                with self._lock:
                    self._require(loaded=loaded is self._objects.get(place.level))
                    self._sweep()
                    made = self._link_container(place.id, loaded, descriptor, cgroup)
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.ENODEV}:
                    raise NotFound(f"{cgroup} was removed while it was attached") from error
                raise Unavailable(f"cannot attach to {cgroup}: {error.strerror}") from error
        if made:
            log.info("cgroup_attached", cgroup_id=place.id, path=str(cgroup), level=place.level)
        return place.id

    def detach(self, cgroup_id: int) -> None:
        """
        Let go of a cgroup in which nobody lives; its links follow when the kernel has forgotten it.
        """
        with self._lock:
            place = self._cgroups.find(cgroup_id)
            if cgroup_id in self._attached and place is not None and place.populated:
                raise Conflict(
                    f"cgroup {cgroup_id} still has processes", hint="stop the container first; it stays attached"
                )
            if cgroup_id in self._attached:
                del self._attached[cgroup_id]
                self._leaving.add(cgroup_id)
            self._sweep()

    def sweep(self) -> None:
        """
        Remove the pins of cgroups that are gone with their last socket.
        """
        with self._lock:
            self._sweep()

    def attached(self) -> set[int]:
        """
        Ids of the cgroups with links of their own, whole ones, that nobody detached.
        """
        return set(self._attached)

    def leaving(self) -> set[int]:
        """
        Ids of detached cgroups that the kernel still holds for a socket, or that were not removed.
        """
        return set(self._leaving)

    def busy(self) -> list[str]:
        """
        Cgroups that are judged and have processes, by path where it is known; also asked before `adopt`.
        """
        found = []
        if self._parent_path is not None:
            found += [str(path) for path in _populated(self._parent_path)]
        elif (parent := self._parent or self._earlier_parent()) is not None:
            now = self._cgroups.find(parent.id)
            found += [f"cgroup {parent.id}"] if now is not None and now.populated else []
        for directory in self._directories():
            place = self._cgroups.find(int(directory.name))
            if place is not None and place.populated:
                found.append(_known_path(directory) or f"cgroup {directory.name}")
        return found

    def faults(self) -> list[str]:
        """
        A line for each living cgroup that somebody took links from: which programs do not judge it now.
        """
        with self._lock:
            return [fault for fault, _ in self._broken()]

    def mend(self) -> tuple[list[str], list[str]]:
        """
        Link again what somebody took away; returns the faults that were mended, and those left with their cause.
        """
        mended, left = [], []
        with self._lock:
            for fault, again in self._broken():
                try:
                    for directory in (self._links.parent, self._links):
                        directory.mkdir(mode=0o700, exist_ok=True)
                    again()
                except (ClawkerError, OSError) as error:
                    left.append(f"{fault}: {error}")
                else:
                    mended.append(fault)
        return mended, left

    def close(self) -> None:
        """
        Give the programs back; links stay pinned. Safe to call twice.
        """
        # What is being loaded pins maps: it would do so again behind a flush.
        with self._loading, self._lock:
            for loaded in self._objects.values():
                loaded.close()
            self._objects.clear()
            self._parent = self._parent_path = None
            self._attached.clear()
            self._leaving.clear()

    # -- inner --------------------------------------------------------------------------------

    def _require(self, *, loaded: bool) -> None:
        if not loaded:
            raise Unavailable("the programs were taken away meanwhile", code="ENFORCEMENT_UNAVAILABLE")

    def _object(self, level: int) -> bpfmap.BpfObject:
        if level not in self._objects:
            self._objects[level] = self._load_object(level)
        return self._objects[level]

    def _directories(self) -> list[Path]:
        if not self._links.exists():
            return []
        return sorted(path for path in self._links.iterdir() if path.name.isdecimal())

    def _needs_links(self, place: Place, cgroup: Path) -> bool:
        """Whether the cgroup has to be linked itself; raises where neither would name the agent rightly."""
        parent, own = self._parent, self._cgroups.own()
        if parent is not None and parent.id in place.line:
            if place.level == parent.level + 1:
                return False
            # The parent's programs judge everything below them by its ancestor at their level, and would
            # do so beside programs of its own. Whoever starts it there is denied, `not_enrolled`.
            raise Conflict(
                f"{cgroup} is not directly below the agents' parent, whose programs know it as something else",
                hint="start the container directly below the agents' parent, or outside it",
            )
        if place.level == 0 or (parent is not None and place.id in parent.line):
            raise Conflict(f"{cgroup} is above the agents' parent: it is no container")
        if own is not None and place.id in own.line:
            raise Conflict(f"the control plane itself runs in {cgroup}")
        around = (self._attached.keys() | self._leaving) & set(place.line[:-1])
        if around:
            raise Conflict(f"{cgroup} is inside the agent of cgroup {max(around)}, and judged as that one")
        return True

    def _link_container(self, cgroup_id: int, loaded: bpfmap.BpfObject, descriptor: int, cgroup: Path) -> bool:
        directory = self._links / str(cgroup_id)
        if cgroup_id in self._attached and all((directory / name).exists() for name, _ in ATTACH):
            return False
        self._link_to(directory, loaded, descriptor, cgroup)
        self._leaving.discard(cgroup_id)
        self._attached[cgroup_id] = str(cgroup)
        return True

    def _link_to(self, directory: Path, loaded: bpfmap.BpfObject, descriptor: int, cgroup: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        _remember_path(directory, cgroup)
        self._link_all(directory, loaded, descriptor, os.fstat(descriptor).st_ino)

    def _link_all(self, directory: Path, loaded: bpfmap.BpfObject, descriptor: int, cgroup_id: int) -> None:
        for name, attach_type in ATTACH:
            program = loaded.program_fd(name)
            if _give_program(directory / name, program, cgroup_id):
                continue
            link = bpfmap.attach(program, descriptor, attach_type)
            try:
                bpfmap.pin(link, str(directory / name))
            finally:
                os.close(link)

    def _earlier_parent(self) -> Place | None:
        for name, _ in ATTACH:
            if (self._links / name).exists():
                cgroup_id = _linked_to(self._links / name)
                place = self._cgroups.find(cgroup_id) if cgroup_id else None
                if place is not None:
                    return place
        return None

    def _adopt_parent(self, path: Path | None, place: Place | None) -> None:
        earlier = self._earlier_parent()
        if earlier is not None and place is not None and earlier.id != place.id:
            if earlier.populated:
                raise Conflict(
                    f"agents still live below an earlier parent cgroup, id {earlier.id}",
                    hint="stop them first, or set host.cgroup_parent back",
                )
            for name, _ in ATTACH:
                (self._links / name).unlink(missing_ok=True)
        if path is not None and place is not None:
            with _opened(path) as descriptor:
                self._link_all(self._links, self._object(place.level + 1), descriptor, place.id)
        elif earlier is not None:
            loaded = self._object(earlier.level + 1)
            for name, _ in ATTACH:
                _give_program(self._links / name, loaded.program_fd(name), earlier.id)
        self._parent, self._parent_path = place or earlier, path

    def _adopt_container(self, cgroup_id: int) -> None:
        directory = self._links / str(cgroup_id)
        place = self._cgroups.find(cgroup_id)
        if place is None:
            # Its level is not known any more. Any other one names an ancestor of it or nobody, and
            # neither has a row: what is left of it is denied.
            for name, _ in ATTACH:
                _give_program(directory / name, next(iter(self._objects.values())).program_fd(name), cgroup_id)
            self._leaving.add(cgroup_id)
            self._sweep()
            return
        if self._parent is not None and self._parent.line in {place.line, place.line[:-1]}:
            # Since a moment ago the parent's programs judge it, by the same id, or it is the parent now.
            shutil.rmtree(directory)
            return
        loaded = self._object(place.level)
        given = [_give_program(directory / name, loaded.program_fd(name), cgroup_id) for name, _ in ATTACH]
        path = _known_path(directory)
        try:
            if not all(given):  # an attachment that was interrupted
                self._finish(cgroup_id, path)
        except (ClawkerError, OSError) as error:
            log.warning("cgroup_half_attached", cgroup_id=cgroup_id, path=path, cause=str(error))
            return
        self._attached[cgroup_id] = path

    def _finish(self, cgroup_id: int, path: str) -> None:
        """Link what a container lacks; raises `NotFound` when its path is not that cgroup's from here."""
        place = self._cgroups.find(cgroup_id)
        with _opened(Path(path or "/nonexistent")) as descriptor:
            if place is None or os.fstat(descriptor).st_ino != cgroup_id:
                raise NotFound(f"{path} is another cgroup now")
            self._link_to(self._links / str(cgroup_id), self._object(place.level), descriptor, Path(path))

    def _broken(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is wrong with each cgroup that lost links, and what links it again."""
        parent, path = self._parent, self._parent_path
        if parent is not None and path is not None:
            # One that was removed and made again is another cgroup at the same place.
            lost = self._lost(self._links, parent.level + 1, path.stat().st_ino if path.is_dir() else 0)
            if lost:
                yield f"the agents' parent {path} is not judged by {lost}", partial(self._relink_parent, path)
        elif parent is not None and self._cgroups.find(parent.id) is not None:
            lost = self._lost(self._links, parent.level + 1, parent.id)
            if lost:
                yield f"the agents' earlier parent, cgroup {parent.id}, is not judged by {lost}", _cannot_relink
        for cgroup_id, known in list(self._attached.items()):
            place = self._cgroups.find(cgroup_id)
            directory = self._links / str(cgroup_id)
            if place is not None and (lost := self._lost(directory, place.level, cgroup_id)):
                yield (
                    f"{known or f'cgroup {cgroup_id}'} is not judged by {lost}",
                    partial(self._finish, cgroup_id, known),
                )

    def _lost(self, directory: Path, level: int, cgroup_id: int) -> str:
        """Which programs for agents at a level are not linked to a cgroup through these pins; "" if all are."""
        loaded, lost = self._object(level), []
        for name, _ in ATTACH:
            try:
                if _link_of(directory / name) == (cgroup_id, bpfmap.program_id(loaded.program_fd(name))):
                    continue
            except OSError:
                pass  # something else is there, or we cannot look: what is not seen to judge does not
            lost.append(name)
        return f"{lost[0]} and {len(lost) - 1} more" if len(lost) > 1 else "".join(lost)

    def _relink_parent(self, path: Path) -> None:
        with _opened(path) as descriptor:
            place = self._cgroups.find(os.fstat(descriptor).st_ino)
            if place is None:
                raise NotFound(f"the kernel has no cgroup {path} any more")
            self._link_all(self._links, self._object(place.level + 1), descriptor, place.id)
        self._parent = place

    def _sweep(self) -> None:
        for cgroup_id in list(self._leaving):
            directory = self._links / str(cgroup_id)
            if any(_linked_to(directory / name) for name, _ in ATTACH):
                continue
            shutil.rmtree(directory, ignore_errors=True)
            self._leaving.discard(cgroup_id)


@contextmanager
def _opened(cgroup: Path) -> Iterator[int]:
    try:
        descriptor = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"there is no cgroup {cgroup}") from error
    except NotADirectoryError as error:
        raise InvalidInput(f"{cgroup} is no directory") from error
    except OSError as error:
        raise Unavailable(f"cannot open {cgroup}: {error.strerror}") from error
    try:
        try:
            # The root has none, nor has a version 1 hierarchy, whose inodes are other numbers.
            os.stat("cgroup.events", dir_fd=descriptor)
        except FileNotFoundError as error:
            raise InvalidInput(f"{cgroup} is no cgroup below the root of cgroup2") from error
        yield descriptor
    finally:
        os.close(descriptor)


def _give_program(pinned: Path, program: int, cgroup_id: int) -> bool:
    """
    Swap the program of a pinned link to this cgroup. A pin of a cgroup that is gone, or of another one, is
    removed. False: nothing is linked here now.
    """
    try:
        link = bpfmap.open_pinned(str(pinned))
    except FileNotFoundError:
        return False
    try:
        if bpfmap.link_info(link)[0] == cgroup_id:
            bpfmap.replace(link, program)
            return True
    except OSError as error:
        if error.errno != errno.ENOLINK:
            raise
    finally:
        os.close(link)
    pinned.unlink()
    return False


def _linked_to(pinned: Path) -> int:
    """The id of the cgroup a pinned link enforces on; 0: nothing is pinned, or the kernel let go."""
    return _link_of(pinned)[0]


def _link_of(pinned: Path) -> tuple[int, int]:
    """The ids of a pinned link's cgroup and program; zeros: nothing is pinned there."""
    try:
        link = bpfmap.open_pinned(str(pinned))
    except FileNotFoundError:
        return 0, 0
    try:
        return bpfmap.link_info(link)
    finally:
        os.close(link)


def _cannot_relink() -> None:
    raise Unavailable("its path is not known here; name it in host.cgroup_parent and restart the control plane")


def _remember_path(directory: Path, cgroup: Path) -> None:
    kept = directory / CGROUP
    if _known_path(directory) == str(cgroup):
        return
    kept.unlink(missing_ok=True)
    kept.symlink_to(cgroup)


def _known_path(directory: Path) -> str:
    with suppress(OSError):
        return str((directory / CGROUP).readlink())
    return ""


def _populated(parent: Path) -> list[Path]:
    """Cgroups directly below `parent` in which, or below which, processes live."""
    found = []
    for child in sorted(parent.iterdir()) if parent.exists() else ():
        events = child / "cgroup.events"
        if events.exists() and "populated 1" in events.read_text():
            found.append(child)
    return found
