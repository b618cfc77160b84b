"""
What an engine is asked to run and what it tells of it; shared by all engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
class SandboxSpec:
    """
    What is asked for. `capabilities` None = none for an ordinary user; `extra` is opaque JSON of
    the application that is kept with the record.
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

    @property
    def project(self) -> str:
        return self.spec.project

    @property
    def agent(self) -> str:
        return self.spec.agent
