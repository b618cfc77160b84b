"""
Sees the cgroup of a container being made, before the container's first process runs.

The kernel tells of a new directory by inotify, on cgroup2 as everywhere. Of a removed one it tells
only the directory above, and a watch on it stays silent for ever: so every directory above a
watched one is watched as well, and looked at anew when something along the way changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from asyncinotify import Event, Inotify, Mask, Watch

from clawker_cp.errors import Unavailable

_WANTED = Mask.CREATE | Mask.DELETE | Mask.ONLYDIR
_EVENTS_A_READ = 64


@dataclass(frozen=True, slots=True)
class Missed:
    """More happened than the kernel keeps: list the directories; what follows is complete again."""


class CgroupWatch:
    """
    Directories made directly below some parents, as an asynchronous iterator of their paths.

    From `async with` on none is missed without a `Missed`; one may be told twice, and may be gone when
    it is told. A parent may not exist yet, or be removed and made again: what is in it when it appears
    is told as new. Has one reader, no thread, and no queue besides the kernel's.
    """

    def __init__(self, parents: Iterable[Path]) -> None:
        self._parents = tuple(dict.fromkeys(parents))
        self._inotify: Inotify | None = None
        self._watches: dict[Path, Watch] = {}
        self._found: list[Path | Missed] = []

    async def __aenter__(self) -> Self:
        try:
            self._inotify = Inotify(cache_size=_EVENTS_A_READ)
        except OSError as error:
            raise _refused(error) from error
        try:
            self._look(tell=False)
        except BaseException:
            self._inotify.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None
        self._watches.clear()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Path | Missed:
        """
        The next new directory, or `Missed`. Raises `Unavailable` when the kernel has no watch left.
        """
        while not self._found:
            if self._inotify is None:
                raise StopAsyncIteration
            self._take(await self._inotify.get())
        return self._found.pop(0)

    def _take(self, event: Event) -> None:
        if Mask.Q_OVERFLOW in event.mask:
            self._look(tell=False)
            self._found.append(Missed())
            return
        directory = event.watch.path if event.watch is not None else None
        if directory is None or event.name is None or Mask.ISDIR not in event.mask:
            return
        path = directory / event.name
        if any(path == parent or path in parent.parents for parent in self._parents):
            self._look(tell=True)
        if directory in self._parents and Mask.CREATE in event.mask:
            self._found.append(path)

    def _look(self, *, tell: bool) -> None:
        """Watch every directory on the way to each parent, and each parent; tell what is in one that is new."""
        for parent in self._parents:
            before = self._watches.get(parent)
            # From above down: what is made after we found it missing is told by the watch above it.
            for directory in [*reversed(parent.parents), parent]:
                self._watch(directory)
            if tell and self._watches.get(parent) not in {None, before}:
                # What was made before the watch is only to be had from a listing; both may tell it.
                self._found += _children(parent)

    def _watch(self, directory: Path) -> None:
        assert self._inotify is not None
        before = self._watches.pop(directory, None)
        try:
            self._watches[directory] = self._inotify.add_watch(directory, _WANTED)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise _refused(error) from error
        if before is not None and self._watches.get(directory) is not before:
            with suppress(OSError):  # the kernel may have removed it with its directory
                self._inotify.rm_watch(before)


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_dir())
    except OSError:
        return []


def _refused(error: OSError) -> Unavailable:
    return Unavailable(
        f"cannot watch for cgroups: {error.strerror}",
        hint="raise the sysctls fs.inotify.max_user_instances and fs.inotify.max_user_watches",
    )
