"""What of the host appears in a sandbox, as arguments of bubblewrap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clawker_cp.engines.base import Mount, SandboxSpec
from clawker_cp.engines.host.cgroups import MountPoint
from clawker_cp.engines.host.filesystem import OwnFiles, check_view, etc_files, view_arguments
from clawker_cp.errors import InvalidInput


def spec(**fields: Any) -> SandboxSpec:
    return SandboxSpec(**{"project": "p", "agent": "a", "argv": ("true",)} | fields)


def view(tmp_path: Path, request: SandboxSpec, masked: list[Path], mounts: list[MountPoint]) -> list[str]:
    (tmp_path / "etc").mkdir(exist_ok=True)
    files = OwnFiles(home=tmp_path / "home", etc=tmp_path / "etc", certificates=None)
    return view_arguments(request, files, masked, mounts)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """Each field that would lead out is named, in one error."""
    request = spec(
        workdir="/etc", mounts=(Mount("/run/x", "/a"), Mount(str(tmp_path), "relative"), Mount("/nowhere", "/b"))
    )
    with pytest.raises(InvalidInput) as refused:
        check_view(request, [])
    for part in ("workdir", "mounts[0].source", "mounts[1].target", "mounts[2].source"):
        assert part in str(refused.value)


def test_link_into_our_directories_is_seen_through(tmp_path: Path) -> None:
    """A symbolic link does not hide that a directory is the control plane's."""
    (tmp_path / "state" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "state" / "inner")
    with pytest.raises(InvalidInput, match="belongs to the control plane"):
        check_view(spec(workdir=str(tmp_path / "link")), [tmp_path / "state"])


def test_protected_directories_and_kernel_mounts_are_covered(tmp_path: Path) -> None:
    """Ours is covered below a mount also when it does not exist yet, and so are bpffs and cgroupfs mounted there."""
    work = tmp_path / "work"
    (work / "bpf").mkdir(parents=True)
    kernel = [MountPoint("/", work / "bpf", "bpf", frozenset()), MountPoint("/", work, "ext4", frozenset())]
    args = view(tmp_path, spec(mounts=(Mount(str(work), "/data"),)), [work / "later"], kernel)
    covered = [args[at + 1] for at, word in enumerate(args) if word == "--tmpfs" and args[at + 1].startswith("/data")]
    assert covered == ["/data/bpf", "/data/later"]
    assert (work / "later").stat().st_mode & 0o777 == 0o700
    assert args.index("--ro-bind", args.index("/data") - 4) < args.index("/data/bpf")


def test_accounts_of_people_stay_outside() -> None:
    """Only package accounts and the agent's own are in passwd; the gate is the only resolver."""
    files = etc_files(spec(uid=4242, gid=4242), "10.231.80.2", "10.231.80.1")
    ids = [int(line.split(":")[2]) for line in files["passwd"].splitlines()]
    assert all(uid < 1000 or uid in {4242, 65534} for uid in ids)
    assert files["resolv.conf"].splitlines()[0] == "nameserver 10.231.80.1"
    assert "10.231.80.2 a" in files["hosts"]
