"""Ways out of a container, by the engine's record (R34, threats.md row 34)."""

from __future__ import annotations

from typing import Any

import pytest

from clawker_cp.engines.docker.exposures import Neighbour, Surroundings, exposures, normal

OWN, NET = "c" * 64, "n" * 64
AROUND = Surroundings(
    network=NET,
    data_root="/srv/docker",
    sockets=("/home/u/sock/docker.sock",),
    own=("/home/u/.config/clawker", "/home/u/.local/share/clawker"),
)


def record(
    *,
    mounts: list[dict[str, Any]] | None = None,
    networks: dict[str, str] | None = None,
    workdir: str = "",
    **host: Any,
) -> dict[str, Any]:
    attached = {name: {"NetworkID": number} for name, number in (networks or {"clawker-net": NET}).items()}
    return {
        "Id": OWN,
        "Name": "/clawker.p.dev",
        "Config": {"Labels": {"dev.clawker.workdir": workdir} if workdir else None},
        "HostConfig": {"NetworkMode": "clawker-net", "ReadonlyPaths": ["/proc/sys"], **host},
        "Mounts": mounts or [],
        "NetworkSettings": {"Networks": attached},
    }


def bind(source: str, *, writable: bool = True) -> dict[str, Any]:
    return {"Type": "bind", "Source": source, "Destination": "/x", "RW": writable}


def volume(name: str) -> dict[str, Any]:
    return {"Type": "volume", "Name": name, "Source": f"/srv/docker/volumes/{name}/_data", "RW": True}


CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("a plain agent has none", record(), set()),
    ("privileged", record(Privileged=True, ReadonlyPaths=None), {"privileged"}),
    ("the host's network", record(NetworkMode="host", networks={"host": "h"}), {"host_network"}),
    ("the host's processes", record(PidMode="host"), {"host_pid"}),
    ("no network is no way out", record(NetworkMode="none", networks={"none": "x"}), set()),
    ("the default capabilities, asked for", record(CapAdd=["NET_RAW", "CAP_CHOWN", "MKNOD", "SYS_CHROOT"]), set()),
    ("capabilities in any spelling", record(CapAdd=["sys_admin", "CAP_BPF"]),
     {"capability:SYS_ADMIN", "capability:BPF"}),
    ("all capabilities", record(CapAdd=["ALL"]), {"capability:ALL"}),
    ("changing its own packets", record(CapAdd=["NET_ADMIN"]), {"capability:NET_ADMIN"}),
    ("files of the host by handle", record(CapAdd=["DAC_READ_SEARCH"]), {"capability:DAC_READ_SEARCH"}),
    ("another kernel", record(CapAdd=["SYS_MODULE"]), {"capability:SYS_MODULE"}),
    ("tracing its own processes", record(CapAdd=["SYS_PTRACE"]), set()),
    ("tracing the host's", record(CapAdd=["SYS_PTRACE"], PidMode="host"), {"capability:SYS_PTRACE", "host_pid"}),
    ("tracing another container's", record(CapAdd=["SYS_PTRACE"], PidMode="container:x"), {"capability:SYS_PTRACE"}),
    ("writable /proc/sys", record(ReadonlyPaths=[]), {"mount:/proc"}),
    # mounts
    ("the whole host", record(mounts=[bind("/")]), {"mount:/", "engine_socket", "cgroupfs", "bpffs"}),
    ("the whole host to read", record(mounts=[bind("/", writable=False)]), {"mount:/", "engine_socket", "bpffs"}),
    ("/etc", record(mounts=[bind("/etc")]), {"mount:/etc"}),
    ("/etc to read", record(mounts=[bind("/etc", writable=False)]), set()),
    ("something in /etc", record(mounts=[bind("/etc/cron.d")]), {"mount:/etc/cron.d"}),
    ("a name that begins like /etc", record(mounts=[bind("/etcetera")]), set()),
    ("/usr", record(mounts=[bind("/usr/")]), {"mount:/usr"}),
    ("/usr/local of the host", record(mounts=[bind("/usr/local/bin")]), {"mount:/usr/local/bin"}),
    ("root's home", record(mounts=[bind("/root")]), {"mount:/root"}),
    ("a user's project", record(mounts=[bind("/home/u/project")]), set()),
    ("/proc", record(mounts=[bind("/proc")]), {"mount:/proc"}),
    ("/sys", record(mounts=[bind("/sys")]), {"mount:/sys", "cgroupfs", "bpffs"}),
    ("cgroupfs", record(mounts=[bind("/sys/fs/cgroup")]), {"mount:/sys/fs/cgroup", "cgroupfs"}),
    ("cgroupfs to read", record(mounts=[bind("/sys/fs/cgroup", writable=False)]), set()),
    ("bpffs", record(mounts=[bind("/sys/fs/bpf")]), {"mount:/sys/fs/bpf", "bpffs"}),
    ("bpffs to read is as good", record(mounts=[bind("/sys/fs/bpf/clawker", writable=False)]), {"bpffs"}),
    ("/dev", record(mounts=[bind("/dev")]), {"mount:/dev"}),
    ("/run", record(mounts=[bind("/run")]), {"mount:/run", "engine_socket"}),
    ("/var/run by its old name", record(mounts=[bind("/var/run")]), {"mount:/run", "engine_socket"}),
    ("/var holds the link only", record(mounts=[bind("/var")]), set()),
    ("the engine's data", record(mounts=[bind("/srv/docker/volumes")]), {"mount:/srv/docker/volumes"}),
    ("what holds the engine's data", record(mounts=[bind("/srv")]), {"mount:/srv"}),
    ("a path with dots", record(mounts=[bind("/home/../etc/./")]), {"mount:/etc"}),
    ("our configuration", record(mounts=[bind("/home/u/.config/clawker")]), {"mount:/home/u/.config/clawker"}),
    ("our keys to read", record(mounts=[bind("/home/u/.local", writable=False)]), {"mount:/home/u/.local"}),
    ("one file of ours to read", record(mounts=[bind("/home/u/.config/clawker/settings.yaml", writable=False)]), set()),
    # the engine's socket
    ("the socket", record(mounts=[bind("/var/run/docker.sock")]), {"engine_socket", "mount:/run/docker.sock"}),
    ("the socket to read", record(mounts=[bind("/run/docker.sock", writable=False)]), {"engine_socket"}),
    ("containerd's", record(mounts=[bind("/run/containerd", writable=False)]), {"engine_socket"}),
    ("a socket elsewhere", record(mounts=[bind("/home/u/sock")]), {"engine_socket"}),
    # the working directory
    ("the working directory", record(mounts=[bind("/root/project")], workdir="/root/project"), set()),
    ("beside the working directory", record(mounts=[bind("/root/.ssh")], workdir="/root/project"),
     {"mount:/root/.ssh"}),
    ("a working directory that shows our own", record(mounts=[bind("/home/u")], workdir="/home/u"),
     {"mount:/home/u", "engine_socket"}),
    # volumes
    ("a volume is the engine's", record(mounts=[volume("cache")]), set()),
    ("a volume that binds", record(mounts=[volume("sly")]), {"mount:/etc"}),
    ("tmpfs", record(mounts=[{"Type": "tmpfs", "Source": "", "Destination": "/tmp"}]), set()),
    # devices
    ("a disk", record(Devices=[{"PathOnHost": "/dev/sda"}]), {"device:/dev/sda"}),
    ("a tunnel", record(Devices=[{"PathOnHost": "/dev/net/tun"}]), {"device:/dev/net/tun"}),
    ("harmless ones", record(Devices=[{"PathOnHost": "/dev/fuse"}, {"PathOnHost": "/dev/dri/card0"}]), set()),
    ("a rule for all disks", record(DeviceCgroupRules=["b *:* rwm"]), {"device:b *:* rwm"}),
    # networks
    ("a second network", record(networks={"clawker-net": NET, "lab": "l"}), {"second_network:lab"}),
    ("another network of our name", record(networks={"clawker-net": "other"}), {"second_network:clawker-net"}),
    ("the network of a web server", record(NetworkMode="container:" + "d" * 64, networks={}), {"shared_network:web"}),
    ("the network of another agent", record(NetworkMode="container:" + "e" * 64, networks={}), set()),
    ("the network of one that is gone", record(NetworkMode="container:" + "f" * 64, networks={}),
     {"shared_network:ffffffffffff"}),
]  # fmt: skip
NEIGHBOURS = [
    Neighbour("d" * 64, "web", "bridge", is_agent=False),
    Neighbour("e" * 64, "clawker.p.other", "clawker-net", is_agent=True),
]


@pytest.mark.parametrize(("found", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_ways_out(found: dict[str, Any], expected: set[str]) -> None:
    """The record shows exactly these ways out, sorted."""
    told = exposures(found, AROUND, neighbours=NEIGHBOURS, volumes={"sly": "/etc"})

    assert set(told) == expected
    assert list(told) == sorted(told)


@pytest.mark.parametrize("mode", [f"container:{OWN}", "container:clawker.p.dev"])
def test_stranger_in_the_agents_network_is_a_way_out_but_an_agent_is_none(mode: str) -> None:
    """Who joined the agent's network namespace can carry its traffic, unless it is enforced itself."""
    joined = Neighbour("1" * 64, "sidecar", mode, is_agent=False)
    assert exposures(record(), AROUND, neighbours=[*NEIGHBOURS, joined]) == ("shared_network:sidecar",)
    agent = Neighbour("1" * 64, "sidecar", mode, is_agent=True)
    assert exposures(record(), AROUND, neighbours=[*NEIGHBOURS, agent]) == ()


@pytest.mark.parametrize(
    "empty",
    [
        {},
        {"HostConfig": None, "Mounts": None, "NetworkSettings": None, "Config": None},
        {"HostConfig": [], "Mounts": "x", "NetworkSettings": {"Networks": []}},
        {"Mounts": [None, {"Type": "bind"}], "HostConfig": {"CapAdd": [1], "Devices": [None]}},
    ],
)
def test_record_of_another_form_shows_nothing_and_breaks_nothing(empty: dict[str, Any]) -> None:
    """What is null, absent or of another type is no way out, and no crash."""
    assert exposures(empty, AROUND) == ()


def test_paths_have_one_form() -> None:
    """Dots, slashes and the old name of /run are gone."""
    assert normal("//etc//x/../") == "/etc"
    assert normal("/var/run/docker.sock") == "/run/docker.sock"
    assert normal("/var/running") == "/var/running"
