"""
A Docker engine on a machine of the test's own, and images made without any registry.

The engine's network, mounts, data and sockets are the machine's; leaving the context ends it with
everything that runs on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from clawker_cp.testing.world import Finished, HostNamespace

ROOT = Path(__file__).parents[3]
START_LIMIT_S = 60.0
BUILD_LIMIT_S = 600.0
# Builds write a gigabyte: not where a test's small files go.
PLACE = ROOT / "build" / "engines"


@dataclass(frozen=True)
class EngineHost:
    """A machine with an engine; `socket` is reachable from outside of it as well."""

    host: HostNamespace
    socket: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which our programs use this engine and keep their files on this machine."""
        return {**self.host.environment(), "DOCKER_HOST": f"unix://{self.socket}"}

    async def docker(self, *words: str, timeout_s: float = 60, data: bytes | None = None) -> Finished:
        """Run the engine's own client."""
        return await self.host.run(
            ["docker", "--host", f"unix://{self.socket}", *words], timeout_s=timeout_s, data=data
        )

    async def out(self, *words: str, timeout_s: float = 60, data: bytes | None = None) -> str:
        """The same for one that has to succeed: what it prints."""
        done = await self.docker(*words, timeout_s=timeout_s, data=data)
        assert done.code == 0, f"docker {words[0]}: {done.err or done.out}"
        return done.out.strip()

    async def ctl(self, *words: str, env: Mapping[str, str] | None = None, timeout_s: float = 150) -> Finished:
        """Run `clawkerctl` as somebody on this machine."""
        argv = [sys.executable, "-m", "clawker_cp.cli.ctl.main", *words]
        return await self.host.run(argv, env={**self.environment, **(env or {})}, timeout_s=timeout_s)

    async def build_image(self, tag: str, *more: str) -> None:
        """Build the image of the control plane as `make image` does; pip fetches outside of this machine."""
        argv = [sys.executable, str(ROOT / "tools" / "image.py"), "--tag", tag, *more]
        environment = {**os.environ, "DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "0"}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *argv, env=environment, stdout=pipe, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(BUILD_LIMIT_S):
                out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, out.decode(errors="replace")[-4000:]


@asynccontextmanager
async def engine_host() -> AsyncIterator[EngineHost]:
    """
    Start an engine on a fresh machine.
    """
    async with HostNamespace() as host:
        directory = PLACE / host.prefix
        directory.mkdir(parents=True)
        engine = EngineHost(host, directory / "docker.sock")
        log = directory / "log"
        argv = [
            "dockerd", "--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec",
            "--pidfile", f"{directory}/pid", "--host", f"unix://{engine.socket}", "--iptables=false",
            "--ip6tables=false", "--cgroup-parent", f"/{host.prefix}-docker", "--shutdown-timeout", "5",
        ]  # fmt: skip
        with log.open("wb") as out:
            daemon = host.popen(argv, stdout=out, stderr=out)
        try:
            await _answers(engine, log)
            yield engine
        finally:
            await _end(engine, daemon)
            await asyncio.to_thread(_remove, host.prefix, directory)


async def _answers(engine: EngineHost, log: Path) -> None:
    async with asyncio.timeout(START_LIMIT_S):
        while (await engine.docker("version")).code:
            if b"failed to start daemon" in log.read_bytes():
                raise RuntimeError(log.read_text(errors="replace")[-2000:])
            await asyncio.sleep(0.2)


async def _end(engine: EngineHost, daemon: object) -> None:
    """Remove what runs, then end the daemon by its own pid file: what we started is the shell before it."""
    with contextlib.suppress(AssertionError, TimeoutError):
        ids = (await engine.out("ps", "-aq")).split()
        if ids:
            await engine.out("rm", "--force", *ids)
    pid_file = engine.socket.with_name("pid")
    if not pid_file.exists():
        return
    pidfd = os.pidfd_open(int(pid_file.read_text()))
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(pidfd)
    finally:
        os.close(pidfd)
    await asyncio.to_thread(daemon.wait)  # type: ignore[attr-defined]


def _remove(prefix: str, directory: Path) -> None:
    """The engine's files, and the cgroups it made in every hierarchy."""
    shutil.rmtree(directory, ignore_errors=True)
    for made in sorted(Path("/sys/fs/cgroup").glob(f"**/{prefix}-docker"), reverse=True):
        for inner in sorted((one for one in made.rglob("*") if one.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                inner.rmdir()
        with contextlib.suppress(OSError):
            made.rmdir()
