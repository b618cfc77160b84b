"""Where a container's cgroup is, for every driver and layout."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawker_cp.engines.docker.cgroups import (
    container_part,
    expected_path,
    locate,
    slice_path,
    unified_path,
    within_mount,
)
from clawker_cp.engines.host.cgroups import find_cgroup2
from clawker_cp.errors import NotFound

ID, OTHER = "ab" * 32, "cd" * 32


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (f"0::/docker/{ID}\n", f"/docker/{ID}"),
        (f"9:name=systemd:/x\n1:cpu:/docker/{ID}\n0::/docker/{ID}\n", f"/docker/{ID}"),
        (f"0::/../../docker/{ID}\n", f"/../../docker/{ID}"),
        ("0::/\n", "/"),
        (f"9:name=systemd:/docker/{ID}\n10:cpu:/\n", ""),
        ("", ""),
        ("0::/with:colon\n", "/with:colon"),
    ],
)
def test_unified_line_is_found_beside_those_of_version_1(text: str, path: str) -> None:
    """Only the line of the unified hierarchy counts, hybrid hosts included."""
    assert unified_path(text) == path


@pytest.mark.parametrize(
    ("root", "path", "inside"),
    [
        ("/", "/docker/x", "docker/x"),
        ("/", "/", ""),
        ("/docker", "/docker/x", "x"),
        ("/docker", "/dockerx/x", None),
        # We are in a cgroup namespace two levels down, and the host's whole hierarchy is mounted.
        ("/../..", "/../../docker/x", "docker/x"),
        ("/../..", "/../..", ""),
        # The mount shows only our own part: a sibling is outside.
        ("/", "/../sibling", None),
        ("/..", "/../../docker/x", None),
        ("/..", "/../x", "x"),
        # Our own child, by a mount from above: nothing says what we are called there.
        ("/../..", "/x", None),
    ],
)
def test_path_is_seen_below_the_mount_or_not_at_all(root: str, path: str, inside: str | None) -> None:
    """Both are relative to the reader's namespace; what the mount does not show is not guessed."""
    assert within_mount(root, path) == inside


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (f"/docker/{ID}", f"/docker/{ID}"),
        (f"/docker/{ID}/init.scope", f"/docker/{ID}"),
        (f"/system.slice/docker-{ID}.scope", f"/system.slice/docker-{ID}.scope"),
        (f"/a.slice/a-b.slice/docker-{ID}.scope/x", f"/a.slice/a-b.slice/docker-{ID}.scope"),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope",
         f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope"),
        (f"/machine.slice/libpod-{ID}.scope", f"/machine.slice/libpod-{ID}.scope"),
        (f"/../docker/{ID}", f"/../docker/{ID}"),
        (f"/docker/{OTHER}", None),
        (f"/docker/{ID}x", None),
        (f"/docker/x{ID}", None),
        (f"/docker/{ID[:12]}", None),
        ("/", None),
        ("", None),
    ],
)  # fmt: skip
def test_containers_own_directory_is_known_by_its_id(path: str, part: str | None) -> None:
    """Whatever the driver calls it, and whatever the container made below; another id is another container."""
    assert container_part(path, ID) == part


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.slice", "a.slice"),
        ("a-b.slice", "a.slice/a-b.slice"),
        ("a-b-c.slice", "a.slice/a-b.slice/a-b-c.slice"),
        ("-.slice", ""),
    ],
)
def test_slices_nest_by_their_names(name: str, path: str) -> None:
    """Each dash is a level, and the root slice is the root."""
    assert slice_path(name) == path


@pytest.mark.parametrize("wrong", ["a", "a/b.slice", "a--b.slice", "-a.slice", "a-.slice", ".slice", ""])
def test_what_is_no_slice_is_refused(wrong: str) -> None:
    """Names that systemd would refuse are refused."""
    with pytest.raises(ValueError, match="slice"):
        slice_path(wrong)


@pytest.mark.parametrize(
    ("driver", "parent", "user", "path"),
    [
        ("cgroupfs", "", None, f"docker/{ID}"),
        ("cgroupfs", "/agents", None, f"agents/{ID}"),
        ("cgroupfs", "agents/nested", None, f"agents/nested/{ID}"),
        ("cgroupfs", "/", None, ID),
        ("systemd", "", None, f"system.slice/docker-{ID}.scope"),
        ("systemd", "clawker-agents.slice", None, f"clawker.slice/clawker-agents.slice/docker-{ID}.scope"),
        ("systemd", "-.slice", None, f"docker-{ID}.scope"),
        ("systemd", "", 1000, f"user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope"),
    ],
)
def test_driver_says_where_a_container_is(driver: str, parent: str, user: int | None, path: str) -> None:
    """Without a process the path follows from driver, parent and owner of the daemon."""
    assert expected_path(ID, driver, parent, user=user) == path


@pytest.fixture
def parent() -> Iterator[Path]:
    made = find_cgroup2() / f"cktest-{os.getpid()}-{secrets.token_hex(3)}"
    made.mkdir()
    try:
        yield made
    finally:
        for directory, _, _ in os.walk(made, topdown=False):
            os.rmdir(directory)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen(["sleep", "100"])
    yield started
    started.kill()
    started.wait()


@pytest.mark.root
def test_process_leads_to_its_containers_cgroup(parent: Path, process: subprocess.Popen[bytes]) -> None:
    """A process in a cgroup that the container made itself leads to the container's own, with its inode as id."""
    inner = parent / f"docker-{ID}.scope" / "init.scope"
    inner.mkdir(parents=True)
    (inner / "cgroup.procs").write_text(str(process.pid))
    place = locate(ID, process.pid)

    assert place.path == parent / f"docker-{ID}.scope"
    assert place.id == place.path.stat().st_ino
    assert place.pid == process.pid
    process.kill()
    process.wait()


@pytest.mark.root
def test_process_of_another_container_is_not_believed(parent: Path, process: subprocess.Popen[bytes]) -> None:
    """A number that belongs to another container's process by now leads nowhere near that container."""
    other = parent / OTHER
    other.mkdir()
    (other / "cgroup.procs").write_text(str(process.pid))
    with pytest.raises(NotFound):
        locate(ID, process.pid)
    process.kill()
    process.wait()


@pytest.mark.root
def test_container_whose_process_is_not_ours_is_found_by_driver_or_by_its_id(parent: Path) -> None:
    """Without a process of ours the driver's path is taken, else the id is searched; the process stays unknown."""
    (parent / ID).mkdir()
    for driver, below in (("cgroupfs", f"/{parent.name}"), ("systemd", ""), ("", "")):
        place = locate(ID, 0, driver=driver, parent=below)
        assert (place.path, place.pid) == (parent / ID, 0)
        assert place.id == (parent / ID).stat().st_ino


@pytest.mark.root
def test_search_does_not_enter_what_containers_made(parent: Path) -> None:
    """A container that names a cgroup of its own after another one is not taken for it."""
    (parent / OTHER / ID).mkdir(parents=True)
    with pytest.raises(NotFound):
        locate(ID, 0)


@pytest.mark.root
def test_container_that_is_gone_is_not_found() -> None:
    """Neither a process nor a cgroup: the container ended."""
    with pytest.raises(NotFound, match=ID[:12]):
        locate(ID, 2**22 + 1, driver="cgroupfs")
