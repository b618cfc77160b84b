"""The kernel says by id where a cgroup is and whether somebody lives in it."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawker_cp.ebpf.kernel_cgroups import LEVELS, KernelCgroups
from clawker_cp.errors import Unsupported
from clawker_cp.testing.socket_world import remove_cgroup
from clawker_cp.testing.world import cgroup2_mount

pytestmark = pytest.mark.root


@pytest.fixture
def base() -> Iterator[Path]:
    made = cgroup2_mount() / f"ckp{os.getpid()}-{secrets.token_hex(2)}"
    made.mkdir()
    try:
        yield made
    finally:
        for directory, _names, _files in os.walk(made, topdown=False):
            remove_cgroup(Path(directory))


@pytest.fixture
def cgroups() -> Iterator[KernelCgroups]:
    made = KernelCgroups()
    yield made
    made.close()
    made.close()


def test_the_line_is_that_of_the_directories(cgroups: KernelCgroups, base: Path) -> None:
    """From the root down to itself, ids are inodes; the own cgroup's line begins at the same root."""
    deep = base / "one" / "two"
    deep.mkdir(parents=True)
    found = cgroups.find(deep.stat().st_ino)
    own = cgroups.own()
    assert found is not None and own is not None
    directories = (deep, deep.parent, base)
    assert found.line[-3:] == tuple(path.stat().st_ino for path in reversed(directories))
    assert (found.id, found.level, found.populated) == (deep.stat().st_ino, len(found.line) - 1, False)
    assert found.line[0] == own.line[0]
    assert own.populated


def test_populated_means_it_or_anything_below_it(cgroups: KernelCgroups, base: Path) -> None:
    """A process in a cgroup populates those above it, and no longer once it is dead."""
    deep = base / "one"
    deep.mkdir()
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    (deep / "cgroup.procs").write_text(str(process.pid))
    alive = [cgroups.find(path.stat().st_ino) for path in (base, deep)]
    process.communicate()
    dead = [cgroups.find(path.stat().st_ino) for path in (base, deep)]
    assert [one.populated for one in alive if one] == [True, True]
    assert [one.populated for one in dead if one] == [False, False]


def test_what_is_gone_is_unknown(cgroups: KernelCgroups, base: Path) -> None:
    """A removed cgroup has no place, nor has a number that was never one; a new one of that path has another id."""
    path = base / "one"
    path.mkdir()
    number = path.stat().st_ino
    path.rmdir()
    path.mkdir()
    assert cgroups.find(number) is None
    assert cgroups.find(2**63) is None
    assert path.stat().st_ino != number


def test_too_deep_is_said(cgroups: KernelCgroups, base: Path) -> None:
    """A cgroup deeper than the answer has room for is an error, not a wrong line."""
    deep = base.joinpath(*["d"] * LEVELS)
    deep.mkdir(parents=True)
    with pytest.raises(Unsupported, match="levels deep"):
        cgroups.find(deep.stat().st_ino)
    shallower = deep.parents[1]
    found = cgroups.find(shallower.stat().st_ino)
    assert found is not None and found.level == LEVELS - 1
