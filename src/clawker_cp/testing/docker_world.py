"""
A Docker daemon of the test's own, on a machine of the test's own, with a tiny image and nothing else.

    async with HostNamespace() as host, DockerWorld(host) as docker:
        agent = await docker.agent("dev", "sleep", "1000")
        assert (await docker.client.inspect(agent))["State"]["Running"]

Files, sockets, bridges and firewall rules are in the machine's directory and namespaces, containers in cgroups of
its own name. Everything is gone afterwards, also when the start fails half-way. Needs root, dockerd and
a static busybox.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import docker

from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.errors import ClawkerError
from clawker_cp.testing.frozen import freeze
from clawker_cp.testing.removal import Removed
from clawker_cp.testing.world import HostNamespace

IMAGE = "clawker-test:1"
START_S = 30.0
STOP_S = 20.0
POLL_S = 0.02
APPLETS = ("sh", "sleep", "cat", "echo", "nc", "ip", "ping", "wget", "nslookup", "id", "kill", "true", "false", "ls")
# With these the image's programs are the machine's: /usr/bin/python3 runs in a stock container.
HOST_USR = ("/usr:/usr:ro", "/etc/ssl:/etc/ssl:ro")


def missing() -> str:
    """
    What this machine lacks for a daemon of its own, "" if nothing.
    """
    for tool, package in (("dockerd", "docker.io"), ("busybox", "busybox-static")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: apt-get install {package}"
    return ""


def image_archive() -> bytes:
    """
    The root file system of the image: busybox, its names, and the links that a mounted /usr needs.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise RuntimeError(missing())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("bin", "tmp", "etc", "usr", "work"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(entry)
        tar.add(Path(busybox).resolve(), "bin/busybox")
        links = {f"bin/{name}": "busybox" for name in APPLETS}
        links |= {name: f"usr/{name}" for name in ("lib", "lib64")}
        for name, target in links.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return buffer.getvalue()


class DockerWorld(Removed):
    """
    One daemon on one machine. `client` is connected to it; `cgroup_parent` is where its containers are.

    `default_parent` leaves the engine's own choice (`/docker`); `live_restore` keeps containers over a
    daemon's death. `stop_daemon`, `kill_daemon` and `start_daemon` are its life.
    """

    def __init__(self, host: HostNamespace, *, default_parent: bool = False, live_restore: bool = False) -> None:
        self.host = host
        self.cgroup_parent = "docker" if default_parent else f"{host.prefix}-docker"
        self._default_parent = default_parent
        self._live_restore = live_restore
        self.directory = Path()
        self.endpoint = ""
        self.client = DockerClient()
        self._process: subprocess.Popen[bytes] | None = None
        self._containerd: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        self.directory = self.host.directory / "docker"
        self.directory.mkdir()
        self.endpoint = f"unix://{self.directory / 'docker.sock'}"
        self.client = DockerClient(self.endpoint)
        async with self._or_removed():
            (self.directory / "daemon.json").write_text("{}")
            await self._start_containerd()
            await self.start_daemon()
            await asyncio.to_thread(self._import_image)
        return self

    @property
    def log(self) -> str:
        """What the daemon wrote so far."""
        return (self.directory / "log").read_text(errors="replace")

    @property
    def cgroup(self) -> Path:
        """The cgroup2 directory that has the containers' ones."""
        return self.host.mount / self.cgroup_parent

    @property
    def _containerd_socket(self) -> Path:
        return self.directory / "containerd.sock"

    @property
    def pid(self) -> int:
        """The daemon's process, 0 when it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def environment(self) -> dict[str, str]:
        """Variables that lead a program to this daemon."""
        return {"DOCKER_HOST": self.endpoint}

    async def start_daemon(self) -> None:
        """
        Start the daemon and wait until it answers; raises `RuntimeError` with its log when it does not.
        """
        argv = ["dockerd", "--host", self.endpoint, "--config-file", str(self.directory / "daemon.json")]
        for flag, name in (("data-root", "data"), ("exec-root", "exec"), ("pidfile", "pid")):
            argv += [f"--{flag}", str(self.directory / name)]
        argv += ["--log-level", "warn"]
        if not self._default_parent:
            argv += ["--cgroup-parent", f"/{self.cgroup_parent}"]
        if self._live_restore:
            argv += ["--live-restore"]
        argv += ["--containerd", str(self._containerd_socket)]
        self._process = self._spawn(argv)
        async with asyncio.timeout(START_S):
            while True:
                with contextlib.suppress(ClawkerError):
                    await self.client.ping()
                    return
                if self._process.poll() is not None:
                    raise RuntimeError(f"dockerd did not start: {self.log[-3000:]}")
                await asyncio.sleep(POLL_S)

    async def stop_daemon(self) -> None:
        """
        End the daemon in order: it stops its containers, unless they are to survive it.
        """
        await _end(self._process, signal.SIGTERM)

    async def kill_daemon(self) -> None:
        """
        SIGKILL the daemon; its containers run on.
        """
        await _end(self._process, signal.SIGKILL)

    def freeze_daemon(self, *, on: bool) -> None:
        """
        Stop the daemon's threads, as a machine under load does, or let them go on.
        """
        if on:
            freeze(self.pid)
        else:
            os.kill(self.pid, signal.SIGCONT)

    async def run(
        self,
        name: str,
        *argv: str,
        labels: Mapping[str, str] | None = None,
        usr: bool = False,
        start: bool = True,
        host_config: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> str:
        """
        Create a container of the image and start it; returns its id. `usr` mounts the machine's programs.

        `host_config` and `config` are the engine's own JSON. A stop is a kill, for process 1 ignores SIGTERM.
        """
        host = dict(host_config or {})
        if usr:
            host["Binds"] = [*host.get("Binds", ()), *HOST_USR]
        made = await self.client.create(
            name,
            {
                "Image": IMAGE,
                "Cmd": list(argv),
                "Labels": dict(labels or {}),
                "HostConfig": host,
                "StopSignal": "SIGKILL",
                **config,
            },
        )
        if start:
            await self.client.start(made)
        return made

    async def agent(self, agent: str, *argv: str, project: str = "p", network: str = "", **options: Any) -> str:
        """
        As `run`, with the name and labels of an agent (contract 1.2), by default sleeping, on `network`.
        """
        labels = {"dev.clawker.managed": "true", "dev.clawker.purpose": "agent", "dev.clawker.agent": agent}
        if project:
            labels["dev.clawker.project"] = project
        labels |= options.pop("labels", {})
        host = {"NetworkMode": network} if network else {}
        host |= options.pop("host_config", {})
        name = options.pop("name", ".".join(part for part in ("clawker", project, agent) if part))
        return await self.run(name, *(argv or ("sleep", "1000")), labels=labels, host_config=host, **options)

    def _import_image(self) -> None:
        sdk = docker.APIClient(base_url=self.endpoint, version="1.41")
        with contextlib.closing(sdk):
            repository, _, tag = IMAGE.partition(":")
            sdk.import_image_from_data(
                image_archive(), repository=repository, tag=tag, changes=["ENV PATH=/bin:/usr/bin:/usr/sbin"]
            )

    async def _start_containerd(self) -> None:
        # Of its own, as distributions run it: it outlives dockerd, and is ours to reap.
        config = self.directory / "containerd.toml"
        config.write_text(
            f"""version = 2
root = "{self.directory / "containerd"}"
state = "{self.directory / "containerd-state"}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{self._containerd_socket}"
"""
        )
        self._containerd = self._spawn(["containerd", "--config", str(config), "--log-level", "warn"])
        async with asyncio.timeout(START_S):
            while not self._containerd_socket.is_socket():
                if self._containerd.poll() is not None:
                    raise RuntimeError(f"containerd did not start: {self.log[-3000:]}")
                await asyncio.sleep(POLL_S)

    def _spawn(self, argv: list[str]) -> subprocess.Popen[bytes]:
        with (self.directory / "log").open("ab") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.host.command(argv)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def _remove(self) -> None:
        await self.client.aclose()
        await _end(self._process, signal.SIGKILL)
        await _end(self._containerd, signal.SIGKILL)
        mounts = _cgroup_mounts()
        left = [cgroup for mount in mounts for cgroup in self._cgroups(mount)]
        for cgroup in left:
            for file, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0"), ("cgroup.kill", "1")):
                with contextlib.suppress(OSError):
                    (cgroup / file).write_text(value)
        if not self._default_parent:
            left += [mount / self.cgroup_parent for mount in mounts]
        left += [mount / self.host.agents.name for mount in mounts if mount != self.host.mount]
        async with asyncio.timeout(STOP_S):
            for cgroup in left:
                await _clear(cgroup)

    def _cgroups(self, mount: Path) -> list[Path]:
        """Those of its containers in one hierarchy, below any parent that a test gives them."""
        kept = self.directory / "data" / "containers"
        names = [path.name for path in kept.iterdir()] if kept.is_dir() else []
        return [mount / parent / name for parent in (self.cgroup_parent, self.host.agents.name) for name in names]


async def _end(process: subprocess.Popen[bytes] | None, number: signal.Signals) -> None:
    if process is None:
        return
    if process.poll() is None:
        process.send_signal(number)
    async with asyncio.timeout(STOP_S):
        while process.poll() is None:
            await asyncio.sleep(POLL_S)


def _cgroup_mounts() -> list[Path]:
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith(("cgroup ", "cgroup2 ")):
            mounts.append(Path(fields.split()[4]))
    return mounts


async def _clear(cgroup: Path) -> None:
    """Remove a cgroup and all below it, once the processes in it are gone."""
    while cgroup.is_dir():
        for directory, _, _ in os.walk(cgroup, topdown=False):
            with contextlib.suppress(OSError):
                Path(directory).rmdir()
        if cgroup.is_dir():
            await asyncio.sleep(POLL_S)
