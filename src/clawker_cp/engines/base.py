"""
What an engine is asked to run and what it tells of it; shared by all engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Mount:
    """A path of the host inside the sandbox."""

    source: str
    target: str
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class Publish:
    """A TCP port of the sandbox on 127.0.0.1 of the host; host_port 0 = chosen."""

    host_port: int
    port: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one sandbox, 0 = none: memory in bytes, CPU in percent of one core, processes."""

    memory_bytes: int = 0
    cpu_percent: int = 0
    pids: int = 0


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """
    What is asked for. `capabilities` (names without `cap_`) None = none for an ordinary user and a
    small set for root; `extra` is opaque JSON of the application that is kept with the record.
    """

    project: str
    agent: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    mounts: tuple[Mount, ...] = ()
    uid: int = 1001
    gid: int = 1001
    allow_root: bool = False
    tty: bool = False
    publish: tuple[Publish, ...] = ()
    capabilities: tuple[str, ...] | None = None
    seccomp: bool = True
    limits: Limits = Limits()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_mapping(self) -> dict[str, Any]:
        """
        The spec as JSON values.
        """
        return {
            "project": self.project,
            "agent": self.agent,
            "argv": list(self.argv),
            "env": dict(self.env),
            "workdir": self.workdir,
            "mounts": [{"source": m.source, "target": m.target, "read_only": m.read_only} for m in self.mounts],
            "uid": self.uid,
            "gid": self.gid,
            "allow_root": self.allow_root,
            "tty": self.tty,
            "publish": [{"host_port": p.host_port, "port": p.port} for p in self.publish],
            "capabilities": None if self.capabilities is None else list(self.capabilities),
            "seccomp": self.seccomp,
            "limits": {
                "memory_bytes": self.limits.memory_bytes,
                "cpu_percent": self.limits.cpu_percent,
                "pids": self.limits.pids,
            },
            "extra": dict(self.extra),
        }

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> SandboxSpec:
        """
        Read a spec back. Raises KeyError, TypeError or ValueError for what is none.
        """
        capabilities = raw.get("capabilities")
        return cls(
            project=str(raw["project"]),
            agent=str(raw["agent"]),
            argv=tuple(str(word) for word in raw["argv"]),
            env={str(k): str(v) for k, v in raw.get("env", {}).items()},
            workdir=str(raw.get("workdir", "/")),
            mounts=tuple(Mount(m["source"], m["target"], bool(m["read_only"])) for m in raw.get("mounts", ())),
            uid=int(raw.get("uid", 1001)),
            gid=int(raw.get("gid", 1001)),
            allow_root=bool(raw.get("allow_root", False)),
            tty=bool(raw.get("tty", False)),
            publish=tuple(Publish(int(p["host_port"]), int(p["port"])) for p in raw.get("publish", ())),
            capabilities=None if capabilities is None else tuple(capabilities),
            seccomp=bool(raw.get("seccomp", True)),
            limits=Limits(**{str(key): int(value) for key, value in raw.get("limits", {}).items()}),
            extra=dict(raw.get("extra", {})),
        )


@dataclass(slots=True)
class Sandbox:
    """One sandbox: where it is in the kernel and the network, and its process once it runs."""

    id: str
    spec: SandboxSpec
    address: str
    netns: str
    interface: str
    cgroup_path: Path
    cgroup_id: int
    directory: Path
    publish: tuple[Publish, ...] = ()
    pid: int = 0
    started: int = 0
    limits_unmet: tuple[str, ...] = ()

    @property
    def project(self) -> str:
        return self.spec.project

    @property
    def agent(self) -> str:
        return self.spec.agent

    @property
    def labels(self) -> dict[str, str]:
        """The labels a container would carry (contract 1.2)."""
        labels = {
            "dev.clawker.managed": "true",
            "dev.clawker.purpose": "agent",
            "dev.clawker.agent": self.spec.agent,
            "dev.clawker.workdir": self.spec.workdir,
            "dev.clawker.engine": "host",
        }
        if self.spec.project:
            labels["dev.clawker.project"] = self.spec.project
        return labels


@dataclass(frozen=True, slots=True)
class RingEvent:
    """
    One packet that the host ring dropped (ruling R18).

    `sandbox_id` is "" when the interface is nobody's; `reason` is one of the kernel layer's
    (contract 2.4); addresses are text, "" when the frame carried none; `lost` counts the records
    the kernel could not hand over before this one.
    """

    time_unix_ns: int
    sandbox_id: str
    reason: str
    ether_type: int = 0
    source: str = ""
    destination: str = ""
    protocol: int = 0
    source_port: int = 0
    destination_port: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class HostFeature:
    """One row of the host preflight: what is there, what it needs, what missing it costs."""

    name: str
    present: bool
    required: bool
    detail: str
    need: str = ""
    cost: str = ""

    def as_mapping(self) -> dict[str, Any]:
        """The row for JSON output."""
        return {
            "name": self.name,
            "present": self.present,
            "required": self.required,
            "detail": self.detail,
            "need": self.need,
            "cost": self.cost,
        }


@dataclass(frozen=True, slots=True)
class AgentNetwork:
    """
    Where agents live, and the addresses that serve them there (contract 1.3); all as text, IPv4.

    `bridge` is the interface of the host's network namespace. On a host `proxy`, `dns` and `cp` are the
    gateway; a control plane that is a container has addresses of its own. `host_proxy` is where the host
    proxy of the released CLI answers, "" = nowhere.
    """

    id: str
    subnet: str
    gateway: str
    bridge: str
    proxy: str
    dns: str
    cp: str
    host_proxy: str = ""

    @property
    def served(self) -> frozenset[str]:
        """Every address of ours on the network."""
        return frozenset((self.proxy, self.dns, self.cp))


@dataclass(frozen=True, slots=True)
class AgentContainer:
    """
    A container as the engine's own record has it; `labels` are the engine's, nothing is the agent's word.

    `address` is on the agents' network, "" without one. `pid` is its first process in our process
    namespace, 0 when it does not run. `cgroup_path` is below the cgroup2 mount and `cgroup_id` its inode,
    0 when it is not known. `interface` is the host's side of its veth, "" when it is not known.
    `publish` are ports the owner published; `exposures` ways out that the owner gave it (R34).
    `shares` is the container whose network namespace it was given, "" with one of its own.
    """

    id: str
    name: str
    labels: Mapping[str, str]
    running: bool
    paused: bool = False
    address: str = ""
    pid: int = 0
    cgroup_path: Path | None = None
    cgroup_id: int = 0
    interface: str = ""
    publish: tuple[Publish, ...] = ()
    exposures: tuple[str, ...] = ()
    started_at_unix: int = 0
    command: tuple[str, ...] = ()
    shares: str = ""

    @property
    def project(self) -> str:
        return self.labels.get("dev.clawker.project", "")

    @property
    def agent(self) -> str:
        return self.labels.get("dev.clawker.agent", "")

    @property
    def is_agent(self) -> bool:
        """Managed and made to be one (contract 1.2, D3)."""
        return self.labels.get("dev.clawker.managed") == "true" and self.labels.get("dev.clawker.purpose") == "agent"


class Engine(Protocol):
    """Who runs agents; verbs raise `errors` classes only and leave nothing half-made when cancelled."""

    ring: Any

    async def start(self) -> None: ...
    async def create(self, spec: SandboxSpec) -> Sandbox: ...
    async def run(self, sandbox_id: str, streams: tuple[int, int, int]) -> None: ...
    async def wait(self, sandbox_id: str) -> int: ...
    async def signal(self, sandbox_id: str, signo: int) -> None: ...
    async def pause(self, sandbox_id: str, *, on: bool) -> None: ...
    async def remove(self, sandbox_id: str, *, force: bool, grace_s: float) -> None: ...
    async def cut(self, sandbox_id: str, match: Callable[[Any], bool]) -> int: ...
    async def aclose(self, *, remove: bool) -> None: ...
    def living(self) -> list[Sandbox]: ...
    def by_address(self, address: str) -> Sandbox | None: ...
