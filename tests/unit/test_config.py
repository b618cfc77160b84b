"""
Settings: where they come from, and that every mistake is told at once with its key.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from clawker_cp.config import Directories, Settings, known_keys, load_settings
from clawker_cp.errors import InvalidInput


def load(tmp_path: Path, text: str = "", cli: str = "", **environ: str) -> Settings:
    (tmp_path / "control-plane.yaml").write_text(text)
    (tmp_path / "settings.yaml").write_text(cli)
    return load_settings(Directories(config=tmp_path, data=tmp_path, state=tmp_path, cache=tmp_path), environ)


def problems(tmp_path: Path, text: str = "", cli: str = "", **environ: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        load(tmp_path, text, cli, **environ)
    return str(caught.value)


def test_defaults(tmp_path: Path) -> None:
    """Without any file everything has the default of the contract."""
    empty = tmp_path / "none"

    settings = load_settings(Directories(config=empty, data=empty, state=empty, cache=empty), {})

    assert settings == Settings()
    assert settings.host.subnet == "10.231.80.0/20"
    assert settings.network.octets.envoy == 200
    assert settings.cli.control_plane.admin_port == 7443
    assert settings.cli.firewall.enable


def test_file(tmp_path: Path) -> None:
    """A key of the file replaces its default and no other; an empty key is the default."""
    settings = load(tmp_path, "dns:\n  budget: {names: 7}\nenvoy:\n  binary:\nengine: host\n")

    assert settings.dns.budget.names == 7
    assert settings.dns.budget.txt == 100
    assert settings.engine == "host"
    assert settings.envoy.binary == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dns: {forwarder: [1.1.1.1]}", "dns.forwarder: there is no such setting, did you mean dns.forwarders"),
        ("enginee: host", "enginee: there is no such setting, did you mean engine"),
        ("qqqqqq: 1", "qqqqqq: there is no such setting"),
        ("cli: {firewall: {enable: false}}", "cli: there is no such setting"),
        ("engine: podman", "engine: Invalid enum value 'podman'"),
        ("metrics_port: many", "metrics_port: Expected `int`, got `str`"),
        ("metrics_port: '7081'", "metrics_port: Expected `int`, got `str`"),
        ("metrics_port: 70000", "metrics_port: 70000 is not a port"),
        ("metrics_port: 4433", "is also metrics_port"),
        ("dns: 5", "dns: is a section"),
        ("host: {subnet: 10.0.0.1/24}", "host.subnet: 10.0.0.1/24 has host bits set"),
        ("host: {subnet: 8.8.8.0/24}", "host.subnet: 8.8.8.0/24 is not a private network"),
        ("host: {subnet: 'fd00::/64'}", "host.subnet: has to be an IPv4 network"),
        ("host: {bridge: a-name-that-is-too-long}", "host.bridge:"),
        ("host: {cgroup_parent: a/b}", "host.cgroup_parent:"),
        ("network: {octets: {envoy: 201}}", "network.octets: envoy, dns and cp have to differ"),
        ("network: {octets: {cp: 255}}", "network.octets.cp: 2 to 254, not 255"),
        ("dns: {forwarders: []}", "dns.forwarders: at least one is needed"),
        ("dns: {forwarders: [dns.example]}", "dns.forwarders: 'dns.example' is not an IP address"),
        ("dns: {zones: {'a..b': [10.0.0.1]}}", "is not a domain name"),
        ("dns: {zones: {corp.example: []}}", "dns.zones.corp.example: at least one server is needed"),
        ("firewall: {pin_dir: pins}", "firewall.pin_dir: has to be an absolute path"),
        ("firewall: {bypass_default_s: 90, bypass_max_s: 60}", "firewall.bypass_default_s: 1 to 60, not 90"),
        ("telemetry: {otlp_endpoint: 'http://c:4318'}", "telemetry.otlp_endpoint: has to begin with https://"),
        ("fleet: {name: f}", "fleet: name and endpoints belong together"),
        ("- a", "is not a mapping of settings"),
        ("engine: host\nengine: docker", "is not YAML"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, told: str) -> None:
    """Each mistake is told with the path of its key and the file it is in."""
    message = problems(tmp_path, text)

    assert told in message
    assert str(tmp_path / "control-plane.yaml") in message


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    """One run tells every mistake."""
    message = problems(tmp_path, "engine: 5\nstak: x\nmetrics_port: 0\n", CLAWKER_CP_DNS__BUDGET__NAMES="x")

    for key in ("engine:", "stak:", "metrics_port:", "CLAWKER_CP_DNS__BUDGET__NAMES:"):
        assert key in message


def test_overrides(tmp_path: Path) -> None:
    """A variable wins over the file; lists are split at commas, numbers and truth values are read."""
    settings = load(
        tmp_path,
        "metrics_port: 1\ndns: {forwarders: [8.8.8.8]}",
        CLAWKER_CP_METRICS_PORT="9000",
        CLAWKER_CP_DNS__FORWARDERS="9.9.9.9, 1.1.1.1",
        CLAWKER_CP_ENVOY__HTTP3="false",
        CLAWKER_CP_NETWORK__OCTETS__DNS="53",
        CLAWKER_CP_BUILD_DEBUG="1",
        CLAWKER_CP_REQUIRE_BPF="1",
    )

    assert settings.metrics_port == 9000
    assert settings.dns.forwarders == ["9.9.9.9", "1.1.1.1"]
    assert settings.envoy.http3 is False
    assert settings.network.octets.dns == 53


@pytest.mark.parametrize(
    "name", ["ENGIN", "DNS", "DNS__", "DNS__FORWARDERS__X", "CLI__FIREWALL", "ENGINE__X", "DNS__ZONES"]
)
def test_bad_overrides(tmp_path: Path, name: str) -> None:
    """A variable that names no single setting is an error that quotes it."""
    assert f"CLAWKER_CP_{name}" in problems(tmp_path, **{f"CLAWKER_CP_{name}": "1"})


def test_released_settings(tmp_path: Path) -> None:
    """Of the released CLI's file only the known keys are read, and they are checked."""
    settings = load(tmp_path, cli="firewall: {enable: false, other: 1}\ncontrol_plane: {admin_port: 8443}\nmore: [1]\n")

    assert not settings.cli.firewall.enable
    assert settings.cli.control_plane.admin_port == 8443
    assert "settings.yaml" in problems(tmp_path, cli="control_plane: {admin_port: x}")
    assert "control_plane.health_port: 7443 is also control_plane.admin_port" in problems(
        tmp_path, cli="control_plane: {health_port: 7443}"
    )


def test_known_keys_have_defaults() -> None:
    """Every key that can be set exists in the defaults under the same path."""
    defaults = msgspec.to_builtins(Settings())
    for key in known_keys():
        value = defaults
        for part in key.split("."):
            value = value[part]


def test_directories_precedence() -> None:
    """Own variable, then XDG with our name below it, then the default below HOME."""
    home = {"HOME": "/home/u"}

    assert Directories.from_environment(home).state == Path("/home/u/.local/state/clawker")
    assert Directories.from_environment({**home, "XDG_STATE_HOME": "/x"}).state == Path("/x/clawker")
    both = {**home, "XDG_STATE_HOME": "/x", "CLAWKER_STATE_DIR": "/own"}
    assert Directories.from_environment(both).state == Path("/own")
    with pytest.raises(InvalidInput, match="CLAWKER_STATE_DIR"):
        Directories.from_environment({**home, "CLAWKER_STATE_DIR": "relative"})
