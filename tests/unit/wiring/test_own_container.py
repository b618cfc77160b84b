"""What the control plane's container is made of, and when one that exists is it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clawker_cp.config import CliPorts, CliSettings, Directories, Settings
from clawker_cp.errors import Conflict
from clawker_cp.pki.tree import CA, CLI_CLIENT, SIGNING_KEY, AuthTree
from clawker_cp.wiring.own_container import (
    BINARY,
    BPFFS,
    SPEC,
    Decision,
    Wanted,
    create_body,
    decide,
    identity_labels,
    is_running,
    last_word,
    published,
)

IMAGE_ID = f"sha256:{'a1' * 32}"
OTHER_ID = f"sha256:{'b2' * 32}"
WANTED = Wanted(
    image="clawker-cp:1",
    image_id=IMAGE_ID,
    address="10.231.96.202",
    socket="/var/run/docker.sock",
    environ={"HOME": "/home/ada", "SUDO_UID": "1000", "CLAWKER_CP_DNS__FORWARDERS": "192.0.2.53"},
    labels={BINARY: "a1" * 32, BPFFS: "/sys/fs/bpf"},
)


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    return Directories(**{kind: tmp_path / kind for kind in ("config", "data", "state", "cache")})


@pytest.fixture
def tree(directories: Directories) -> AuthTree:
    tree = AuthTree(directories.data / "auth")
    tree.ensure()
    return tree


@pytest.fixture
def body(directories: Directories, tree: AuthTree) -> dict[str, Any]:
    return create_body(Settings(), directories, tree, WANTED)


def test_nothing_secret_of_the_operator_is_mounted(body: dict[str, Any], tree: AuthTree) -> None:
    """Neither the CA's key, nor the CLI's signing key, nor its client pair, nor a directory that has one of them."""
    never = [tree.path(name) for name in (CA.key, SIGNING_KEY, CLI_CLIENT.certificate, CLI_CLIENT.key)]
    sources = [Path(mount["Source"]) for mount in body["HostConfig"]["Mounts"]]
    assert all(secret.exists() for secret in never)
    assert not [(s, n) for s in sources for n in never if n == s or s in n.parents]


def test_mounts_are_those_of_the_contract(body: dict[str, Any], directories: Directories) -> None:
    """Writable are logs, pins, the firewall's and the server's files; everything else is read-only."""
    mounts = {mount["Target"]: mount for mount in body["HostConfig"]["Mounts"]}
    writable = {target: mount["Source"] for target, mount in mounts.items() if not mount["ReadOnly"]}
    assert writable == {
        "/var/log/clawker": str(directories.logs),
        "/sys/fs/bpf": "/sys/fs/bpf",
        "/usr/local/share/clawker/firewall": str(directories.firewall),
        "/usr/local/share/clawker/controlplane": str(directories.data / "controlplane"),
    }
    assert mounts["/etc/clawker/auth/tls/ca.pem"]["Source"] == str(directories.data / "auth/ca/ca.pem")
    assert {"/etc/clawker/config", "/sys/fs/cgroup", "/var/run/docker.sock"} < set(mounts) - set(writable)
    assert len(mounts) == len(body["HostConfig"]["Mounts"])


def test_the_optional_intermediate_is_mounted_when_it_is_there(directories: Directories, tree: AuthTree) -> None:
    """A sandbox's issuer is part of the container once it was made, which is another container."""
    before = create_body(Settings(), directories, tree, WANTED)
    tree.enable_agents_ca()
    after = create_body(Settings(), directories, tree, WANTED)
    assert not [m for m in before["HostConfig"]["Mounts"] if "agents-ca" in m["Target"]]
    assert len([m for m in after["HostConfig"]["Mounts"] if "agents-ca" in m["Target"]]) == 2
    assert before["Labels"][SPEC] != after["Labels"][SPEC]


def test_it_may_do_what_it_needs_and_no_more(body: dict[str, Any]) -> None:
    """Every capability is dropped but six; the host's processes and cgroups are seen; a failure restarts it thrice."""
    host = body["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert {"BPF", "SYS_ADMIN", "NET_ADMIN"} < set(host["CapAdd"])
    assert len(host["CapAdd"]) == 6
    assert "Privileged" not in host
    assert (host["PidMode"], host["CgroupnsMode"], host["NetworkMode"]) == ("host", "host", "clawker-net")
    assert host["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 3}
    assert "apparmor=unconfined" in host["SecurityOpt"]
    assert host["ExtraHosts"] == ["host.docker.internal:host-gateway"]


def test_ports_are_published_on_loopback_only(directories: Directories, tree: AuthTree) -> None:
    """As settings.yaml has them; the agents' port and the authority's admin port never are."""
    ports = CliPorts(admin_port=17443, agent_port=17444, health_port=17080, hydra_public_port=14444)
    settings = msgspec.structs.replace(Settings(), cli=CliSettings(control_plane=ports))
    body = create_body(settings, directories, tree, WANTED)
    assert published(settings) == [17443, 14444, 17080, 7081]
    assert set(body["HostConfig"]["PortBindings"]) == {f"{port}/tcp" for port in published(settings)}
    assert {one["HostIp"] for bound in body["HostConfig"]["PortBindings"].values() for one in bound} == {"127.0.0.1"}
    assert "17080" in body["Healthcheck"]["Test"][-1]


def test_the_environment_says_where_the_host_has_things(body: dict[str, Any], directories: Directories) -> None:
    """Directories of the host, who called sudo, settings given by variable; nothing else of the caller's."""
    found = dict(line.split("=", 1) for line in body["Env"])
    assert found["CLAWKER_HOST_DATA_DIR"] == str(directories.data)
    assert (found["TZ"], found["DOCKER_HOST"]) == ("UTC", "unix:///var/run/docker.sock")
    assert (found["CLAWKER_HOST_UID"], found["CLAWKER_CP_DNS__FORWARDERS"]) == ("1000", "192.0.2.53")
    assert (found["CLAWKER_CP_BINARY_SHA"], "HOME" in found, "CLAWKER_HOST_GID" in found) == ("a1" * 32, False, False)


def change_nothing(_body: dict[str, Any]) -> None:
    pass


def stop(record: dict[str, Any]) -> None:
    record["State"] = {"Running": False, "Restarting": False}


def restart(record: dict[str, Any]) -> None:
    record["State"] = {"Running": True, "Restarting": True}


def other_image(record: dict[str, Any]) -> None:
    record["Image"], record["Config"]["Labels"][SPEC] = OTHER_ID, "c3"


def other_spec(record: dict[str, Any]) -> None:
    record["Config"]["Labels"][SPEC] = "c3"


def foreign_maker(record: dict[str, Any]) -> None:
    del record["Config"]["Labels"][SPEC]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_nothing, Decision("keep")),
        (stop, Decision("start", "it had stopped")),
        (restart, Decision("start", "it had stopped")),
        (other_image, Decision("replace", "the image is another one")),
        (other_spec, Decision("replace", "settings, ports, mounts or certificates are others")),
        (foreign_maker, Decision("replace", "it was made by another program")),
    ],
)
def test_what_is_done_about_one_that_exists(
    body: dict[str, Any], change: Callable[[dict[str, Any]], None], expected: Decision
) -> None:
    """An equal one is kept, a stopped one started, another one replaced, with the reason."""
    record = {
        "Image": IMAGE_ID, "State": {"Running": True}, "Config": {"Labels": copy.deepcopy(body["Labels"])},
    }  # fmt: skip
    change(record)
    assert decide(record, body, IMAGE_ID) == expected
    assert decide(None, body, IMAGE_ID) == Decision("create")


@pytest.mark.parametrize("labels", [None, {}, {"dev.clawker.managed": "true", "dev.clawker.purpose": "agent"}])
def test_somebody_elses_container_is_not_touched(body: dict[str, Any], labels: dict[str, str] | None) -> None:
    """The name alone makes nothing ours."""
    record = {"Image": IMAGE_ID, "State": {"Running": True}, "Config": {"Labels": labels}}
    with pytest.raises(Conflict, match="no control plane"):
        decide(record, body, IMAGE_ID)


def test_the_digest_sees_what_the_name_of_an_image_does_not(directories: Directories, tree: AuthTree) -> None:
    """Another image by that name, other settings, certificates or address: another container. The name alone: not."""

    def digest(settings: Settings = Settings(), **changes: Any) -> str:
        wanted = Wanted(**{name: changes.get(name, getattr(WANTED, name)) for name in Wanted.__slots__})
        return str(create_body(settings, directories, tree, wanted)["Labels"][SPEC])

    first = digest()
    assert digest(image="registry.example/clawker-cp") == first
    quiet = msgspec.structs.replace(Settings(), engine="docker")
    assert len({first, digest(image_id=OTHER_ID), digest(address=""), digest(environ={}), digest(quiet)}) == 5
    tree.rotate()
    assert digest() != first


@pytest.mark.parametrize(
    ("existing", "environ", "binary"),
    [
        (None, {}, "a1" * 32),
        (None, {"CLAWKER_CP_BINARY_SHA": "d4"}, "d4"),
        ({"Image": OTHER_ID, "Config": {"Labels": {BINARY: "d4"}}}, {}, "d4"),
        ({"Image": OTHER_ID, "Config": {"Labels": {BINARY: "b2" * 32}}}, {}, "a1" * 32),
        ({"Image": OTHER_ID, "Config": {"Labels": None}}, {}, "a1" * 32),
    ],
    ids=["a first one", "told", "one that the released CLI made", "one of ours", "one without labels"],
)
def test_what_the_released_cli_adopts_by(existing: dict[str, Any] | None, environ: dict[str, str], binary: str) -> None:
    """Its own value lives through a replacement; ours follows the image."""
    assert identity_labels(existing, IMAGE_ID, environ)[BINARY] == binary


def test_the_pins_label_is_kept() -> None:
    """Told, else the replaced one's, else where the host has them."""
    existing = {"Image": OTHER_ID, "Config": {"Labels": {BPFFS: "/elsewhere"}}}
    assert identity_labels(existing, IMAGE_ID, {})[BPFFS] == "/elsewhere"
    assert identity_labels(existing, IMAGE_ID, {"CLAWKER_HOST_BPFFS_SOURCE": "/told"})[BPFFS] == "/told"
    assert identity_labels(None, IMAGE_ID, {})[BPFFS] == "/sys/fs/bpf"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", ""),
        ("plain\n\n", "plain"),
        ('{"level":"info","event":"cp_starting"}\nclawker-cp: no bpffs\n  hint: mount it\n', "no bpffs"),
        (
            '{"level":"error","event":"cp_child_lost","message":"lost","cause":"envoy"}\n{"level":"info","event":"x"}',
            "cp_child_lost lost envoy",
        ),
        ('["error"]\n', '["error"]'),
    ],
)
def test_the_last_word_is_the_reason(log: str, expected: str) -> None:
    """The last error if there is one, else the last line."""
    assert last_word(log) == expected


def test_one_that_is_being_restarted_does_not_run() -> None:
    """The engine counts it as running."""
    assert is_running({"State": {"Running": True}})
    assert not is_running({"State": {"Running": True, "Restarting": True}})
