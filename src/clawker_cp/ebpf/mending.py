"""
Whether what was loaded still enforces, and putting back what somebody else took away: links and pins.

Removing the pin of a link detaches it, so what root does below the pin directory can open an agent
until it is seen. Blocks for a fraction of a millisecond per judged cgroup: called in a thread.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import structlog

from clawker_cp._fast import bpfmap
from clawker_cp.ebpf.attachments import Attachments

log = structlog.get_logger()

BPF_EXIST = 2  # of <linux/bpf.h>: change a row, make none
NOBODY = bytes(8)


class Mender:
    """
    Looks at the links, the maps and their pins. `maps` are those that are open, none while nothing is loaded.
    """

    def __init__(self, pin_dir: Path, attachments: Attachments, maps: Mapping[str, bpfmap.BpfMap]) -> None:
        self._pin_dir = pin_dir
        self._attachments = attachments
        self._maps = maps
        self._lock = threading.Lock()

    def faults(self) -> list[str]:
        """
        What does not enforce now, a line each: links and pins that were taken away, maps that take no rows.
        """
        with self._lock:
            if not self._maps:
                return ["the programs are not attached"]
            return [*self._attachments.faults(), *self._refusals(), *map(_unpinned, self._missing())]

    def mend(self) -> list[str]:
        """
        Put back what was taken away (`links_restored`); returns the faults that stay, with their causes.
        """
        with self._lock:
            if not self._maps:
                return []
            mended, left = self._attachments.mend()
            for name in self._missing():
                try:
                    self._pin_dir.mkdir(mode=0o700, exist_ok=True)
                    bpfmap.pin(self._maps[name].fd, str(self._pin_dir / name))
                    mended.append(_unpinned(name))
                except OSError as error:
                    left.append(f"{_unpinned(name)}: {error.strerror}")
            for fault in mended:
                log.warning("links_restored", fault=fault, hint=f"find out who else writes below {self._pin_dir}")
            return left + self._refusals()

    def paused(self) -> AbstractContextManager[object]:
        """
        Nothing is put back while this is held: for closing the maps, after which nothing is missed.
        """
        return self._lock

    def _missing(self) -> list[str]:
        return [name for name in self._maps if not (self._pin_dir / name).exists()]

    def _refusals(self) -> list[str]:
        # Changing a row that nobody has tells a map that takes none from one that does, and changes nothing.
        containers = self._maps["container_map"]
        try:
            containers.put(NOBODY, bytes(containers.value_bytes), flags=BPF_EXIST)
        except OSError as error:
            return [] if error.errno == errno.ENOENT else [f"container_map takes no rows: {error.strerror}"]
        return []


def _unpinned(name: str) -> str:
    return f"{name} is not pinned: the next start would not find its rows"
