"""Where the server finds itself, and what it binds there."""

from __future__ import annotations

from pathlib import Path

import pytest

from clawker_cp.wiring.placement import HOST_NETNS, Placement, container_id, look, placement

ID = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
HOST = "0::/init.scope\n"
CGROUPFS = f"9:name=systemd:/docker/{ID}\n0::/docker/{ID}\n"
SYSTEMD = f"0::/system.slice/docker-{ID}.scope\n"
FILES = (
    f"601 580 254:0 /var/lib/docker/containers/{ID}/resolv.conf /etc/resolv.conf rw - ext4 /dev/vda rw\n"
    f"602 580 254:0 /var/lib/docker/containers/{ID}/hosts /etc/hosts rw - ext4 /dev/vda rw\n"
)
CONFIG = "610 580 254:0 /home/ada/.config/clawker /etc/clawker/config ro - ext4 /dev/vda rw\n"
TREE = "611 580 254:0 /home/ada/ca.pem /etc/clawker/auth/tls/ca.pem ro - ext4 /dev/vda rw\n"
# The engine's own directory, seen from the host: other containers' files are no sign of being in one.
ENGINE = f"90 25 0:44 / /var/lib/docker/overlay2/{OTHER}/merged rw - overlay overlay rw\n"


@pytest.mark.parametrize(
    ("own", "first", "mounts", "expected"),
    [
        (HOST, HOST, ENGINE, Placement()),
        ("0::/user.slice/session.scope\n", HOST, ENGINE, Placement()),
        (CGROUPFS, HOST, FILES + CONFIG, Placement(ID, HOST_NETNS, True)),
        (SYSTEMD, HOST, FILES + TREE, Placement(ID, HOST_NETNS, True)),
        (SYSTEMD, HOST, TREE, Placement(ID, HOST_NETNS, True)),
        (CGROUPFS, CGROUPFS, FILES + CONFIG, Placement(ID, None, False)),
        ("0::/\n", "0::/\n", FILES + CONFIG, Placement(ID, None, False)),
        (CGROUPFS, "", FILES + CONFIG, Placement(ID, None, False)),
        (CGROUPFS, HOST, FILES, Placement()),
        ("", "", "", Placement()),
    ],
    ids=[
        "a host with containers",
        "a login on it",
        "container, cgroupfs, host's processes",
        "container, systemd",
        "no engine's files to see",
        "container with processes of its own",
        "private cgroup namespace",
        "process 1 is hidden",
        "somebody's build container",
        "no /proc",
    ],
)
def test_where_we_are(own: str, first: str, mounts: str, expected: Placement) -> None:
    """A container is ours when something is mounted for it; the host is reached through a process 1 that is not us."""
    assert placement(own, first, mounts) == expected


@pytest.mark.parametrize(
    ("cgroup", "mounts", "expected"),
    [
        (CGROUPFS, "", ID),
        (f"0::/docker/{OTHER}/docker/{ID}\n", "", ""),
        (f"0::/docker/{OTHER}\n", FILES, ID),
        ("0::/machine.slice/x.scope\n", ENGINE, ""),
        (f"0::/docker/{ID[:63]}\n", "", ""),
    ],
    ids=["cgroup", "two ids are none", "files win", "none", "not an id"],
)
def test_own_id(cgroup: str, mounts: str, expected: str) -> None:
    """The engine's files name the container, then its cgroup; what is not certain is no id."""
    assert container_id(cgroup, mounts) == expected


def test_a_container_binds_what_is_published() -> None:
    """Everywhere, except what nobody outside may reach."""
    bound = Placement(ID, HOST_NETNS).listeners("10.231.96.202")
    everywhere = ("0.0.0.0",)
    assert (bound.admin, bound.agents, bound.health, bound.metrics, bound.tokens) == (everywhere,) * 5
    assert (bound.token_admin, bound.probe_agents) == (("127.0.0.1",), "127.0.0.1")


def test_a_host_binds_loopback_and_the_agents_side() -> None:
    """Operators on loopback, agents on the gateway, health and tokens on both, each once."""
    bound = Placement().listeners("10.231.96.1")
    assert (bound.admin, bound.metrics, bound.token_admin) == (("127.0.0.1",),) * 3
    assert (bound.agents, bound.probe_agents) == (("10.231.96.1",), "10.231.96.1")
    assert bound.health == bound.tokens == ("127.0.0.1", "10.231.96.1")
    assert Placement().listeners("127.0.0.1").health == ("127.0.0.1",)


def test_looking_reads_proc(tmp_path: Path) -> None:
    """What cannot be read is as if it were empty."""
    for name, text in (("self/cgroup", CGROUPFS), ("1/cgroup", HOST), ("self/mountinfo", FILES + CONFIG)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert look(tmp_path) == Placement(ID, HOST_NETNS, True)
    assert look(tmp_path / "nowhere") == Placement()
