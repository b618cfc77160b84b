"""
What a control plane that died left in the kernel, taken away by a container that lives for that moment.

Pins and packet filters are root's, and whoever calls `clawkerctl down` may be anybody who may use the engine: so the
image's own `ebpf-manager flush` does it, with the mounts and capabilities it needs of the control plane's, and neither
network nor port. Starting the dead server again to have it drain would need ports, certificates and containers beside
it to be well, which is what it may have died of, and a server that is gone could not be started at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import orjson

from clawker_cp.errors import Conflict, NotFound, Unavailable
from clawker_cp.wiring.own_container import BPF_FS, CGROUPS, MANAGED, NAME, PURPOSE, bind, last_word

SWEEPER = f"{NAME}.sweep"
SWEEP = "sweep"  # its purpose
CAPABILITIES = ("BPF", "NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE")
LIMIT_S = 30.0
REMOVE_LIMIT_S = 10.0
HOST_PID = "1"  # the host's first process, seen from a container with pid: host


class Docker(Protocol):
    """What is asked of the engine (`engines.docker_client.DockerClient`)."""

    async def inspect(self, reference: str) -> dict[str, Any]: ...
    async def start(self, reference: str) -> None: ...
    async def wait(self, reference: str, *, limit_s: float) -> int: ...
    async def remove(self, reference: str, *, force: bool = False) -> None: ...
    async def logs(self, reference: str, *, lines: int = 100) -> bytes: ...


def sweeper_body(image_id: str, pin_dir: str) -> dict[str, Any]:
    """
    The engine's create request.
    """
    return {
        "Image": image_id,
        "Entrypoint": ["ebpf-manager"],
        "Cmd": ["--pin-dir", pin_dir, "flush", "--host-pid", HOST_PID, "--json"],
        "User": "0:0",
        "Labels": {MANAGED: "true", PURPOSE: SWEEP},
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            "Mounts": [bind(CGROUPS, CGROUPS, read_only=True), bind(BPF_FS, BPF_FS, read_only=False)],
            "CapDrop": ["ALL"],
            "CapAdd": list(CAPABILITIES),
            "SecurityOpt": ["apparmor=unconfined", "no-new-privileges"],
            "PidMode": "host",
            "CgroupnsMode": "host",
            "NetworkMode": "none",
            "LogConfig": {"Type": "json-file"},
        },
    }


async def sweep(
    docker: Docker, create: Callable[[str, Mapping[str, Any]], Awaitable[object]], image_id: str, pin_dir: str
) -> list[str]:
    """
    Take away pins and packet filters; returns what there was.

    Raises `Conflict` with the reason when something of it has to stay, as while an agent lives.
    """
    await _remove_earlier(docker)
    await create(SWEEPER, sweeper_body(image_id, pin_dir))
    try:
        await docker.start(SWEEPER)
        code = await docker.wait(SWEEPER, limit_s=LIMIT_S)
        said = (await docker.logs(SWEEPER)).decode("utf-8", "replace")
    finally:
        async with asyncio.timeout(REMOVE_LIMIT_S):
            await docker.remove(SWEEPER, force=True)
    if code:
        raise Conflict(
            f"what the control plane left in the kernel stays: {last_word(said) or f'exit code {code}'}",
            hint="enforcement is as it was; when this is dealt with, `clawkerctl down` goes on",
        )
    try:
        return [str(one) for one in orjson.loads(said)["removed"]]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise Unavailable(f"{SWEEPER} did not say what it removed: {last_word(said)}") from error


async def _remove_earlier(docker: Docker) -> None:
    """One whose caller was killed; a stranger of the name is left for the engine to refuse."""
    try:
        record = await docker.inspect(SWEEPER)
    except NotFound:
        return
    if (record["Config"].get("Labels") or {}).get(PURPOSE) == SWEEP:
        await docker.remove(SWEEPER, force=True)
