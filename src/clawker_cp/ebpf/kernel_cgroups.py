"""
Where a cgroup is and whether somebody lives in it, asked of the kernel by id.

A path says neither in a container: the hierarchy is seen through a cgroup namespace and through
mounts, and a path is reused. Ids are not: the kernel never gives one out again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from importlib.resources import files

from clawker_cp._fast import bpfmap
from clawker_cp.errors import Unsupported

LEVELS = 32  # CLAWKER_LEVELS of bpf/level.bpf.c
UNKNOWN = 0xFFFFFFFF
_QUERY = struct.Struct(f"<{2 + LEVELS}Q")


@dataclass(frozen=True, slots=True)
class Place:
    """Ids from the root of the hierarchy down to the cgroup itself, and whether processes live in or below it."""

    line: tuple[int, ...]
    populated: bool

    @property
    def id(self) -> int:
        return self.line[-1]

    @property
    def level(self) -> int:
        return len(self.line) - 1


class KernelCgroups:
    """Loads its program with the first question; `close` gives it back, and the next question loads it again."""

    def __init__(self) -> None:
        self._object: bpfmap.BpfObject | None = None

    def find(self, cgroup_id: int) -> Place | None:
        """
        The place of a cgroup, None when there is none of that id or no longer. Raises `OSError` where
        the kernel does not take the program, `Unsupported` for a cgroup deeper than `LEVELS`.
        """
        if self._object is None:
            path = files("clawker_cp") / "_bpf" / "level.bpf.o"
            self._object = bpfmap.BpfObject.load(str(path), pin_dir=None, agent_level=0, max_agents=1)
        program = self._object.program_fd("clawker_level")
        level, answer = bpfmap.run_program(program, _QUERY.pack(cgroup_id, 0, *(0,) * LEVELS))
        if level == UNKNOWN:
            return None
        if level >= LEVELS:
            raise Unsupported(f"cgroup {cgroup_id} is {level} levels deep", feature=f"cgroups below level {LEVELS - 1}")
        _id, populated, *line = _QUERY.unpack(answer)
        return Place(tuple(line[: level + 1]), bool(populated))

    def own(self) -> Place | None:
        """
        The place of the cgroup we run in.
        """
        return self.find(0)

    def close(self) -> None:
        """
        Give the program back. Safe to call twice.
        """
        if self._object is not None:
            self._object.close()
            self._object = None
