"""
The image of the control plane and `clawkerctl` on a machine with a Docker engine of the test's own.

`docker_world.py` has the engine; this has the programs that people use on it, and the image made without any registry.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from clawker_cp.testing.docker_world import DockerWorld
from clawker_cp.testing.world import Finished, HostNamespace

ROOT = Path(__file__).parents[3]
BUILD_LIMIT_S = 600.0


@dataclass(frozen=True)
class EngineHost:
    """A machine with an engine."""

    host: HostNamespace
    world: DockerWorld

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which our programs use this engine and keep their files on this machine."""
        return {**self.host.environment(), **self.world.environment()}

    async def docker(self, *words: str, timeout_s: float = 60, data: bytes | None = None) -> Finished:
        """Run the engine's own client."""
        return await self.host.run(["docker", "--host", self.world.endpoint, *words], timeout_s=timeout_s, data=data)

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
        environment = {**os.environ, **self.world.environment(), "DOCKER_BUILDKIT": "0"}
        process = await asyncio.create_subprocess_exec(
            *argv, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
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
    async with HostNamespace() as host, DockerWorld(host) as world:
        yield EngineHost(host, world)
