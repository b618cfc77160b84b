"""Finding cgroup2 and the controllers."""

from __future__ import annotations

from pathlib import Path

import pytest

from clawker_cp.engines.host.cgroups import find_cgroup2, read_mounts
from clawker_cp.errors import Unsupported

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:38 /inner /mnt/part rw,relatime - cgroup2 cgroup2 rw
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:5 master:1 - cgroup2 cgroup2 rw
42 31 0:40 / /mnt/with\\040space rw - ext4 /dev/x rw
"""


def test_whole_mount_is_preferred_wherever_it_is(tmp_path: Path) -> None:
    """On a hybrid host the mount of the whole hierarchy is found beside version 1 and partial mounts."""
    (tmp_path / "mountinfo").write_text(HYBRID)
    assert find_cgroup2(tmp_path / "mountinfo") == Path("/sys/fs/cgroup/unified")


def test_host_without_cgroup2_is_told_what_to_mount(tmp_path: Path) -> None:
    """Without cgroup2 the error names the feature and the command."""
    (tmp_path / "mountinfo").write_text(HYBRID.splitlines()[0])
    with pytest.raises(Unsupported) as refused:
        find_cgroup2(tmp_path / "mountinfo")
    assert refused.value.feature == "cgroup2"
    assert "mount -t cgroup2" in str(refused.value.hint)


def test_escapes_and_optional_fields_are_read(tmp_path: Path) -> None:
    """Octal escapes are undone, and optional fields do not shift the rest."""
    (tmp_path / "mountinfo").write_text(HYBRID)
    mounts = {mount.path: mount for mount in read_mounts(tmp_path / "mountinfo")}
    assert mounts[Path("/mnt/with space")].kind == "ext4"
    assert "pids" in mounts[Path("/sys/fs/cgroup/pids")].options
    assert mounts[Path("/sys/fs/cgroup/unified")].kind == "cgroup2"
