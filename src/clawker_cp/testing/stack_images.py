"""
Images of Envoy and CoreDNS for a daemon of the test's own, made from this machine's programs without any registry.

    await import_stack_images(docker)          # ENVOY_IMAGE and COREDNS_IMAGE are there now

Each holds one program where its maker's image has it, the libraries it needs, and nothing else: no shell, no roots.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import subprocess
import tarfile
from pathlib import Path

import docker

from clawker_cp.firewall.envoy.options import find_binary
from clawker_cp.testing.docker_world import DockerWorld
from clawker_cp.testing.peers import peer

ENVOY_IMAGE = "clawker-test-envoy:1"
COREDNS_IMAGE = "clawker-test-coredns:1"
ENVOY_AT, COREDNS_AT = "usr/local/bin/envoy", "coredns"
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


def settings() -> dict[str, str]:
    """Variables that make a server use containers of these images."""
    return {
        "CLAWKER_CP_STACK": "container",
        "CLAWKER_CP_ENVOY__IMAGE": ENVOY_IMAGE,
        "CLAWKER_CP_DNS__COREDNS_IMAGE": COREDNS_IMAGE,
    }


def archive(program: Path, target: str) -> bytes:
    """
    A root file system with one program, at `target`, and the libraries that it is linked to.
    """
    linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("etc", "tmp"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for source, name in [(program, target), *((Path(found), found[1:]) for found in _LIBRARY.findall(linked))]:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = source.stat().st_size, 0o755
            with source.open("rb") as file:
                tar.addfile(entry, file)
    return buffer.getvalue()


async def import_stack_images(world: DockerWorld) -> None:
    """
    Give a daemon both images, CoreDNS's where it is built (`make peers`).
    """
    await asyncio.to_thread(_import, world.endpoint, archive(find_binary(), ENVOY_AT), ENVOY_IMAGE)
    coredns = peer("coredns")
    if coredns is not None:
        await asyncio.to_thread(_import, world.endpoint, archive(coredns, COREDNS_AT), COREDNS_IMAGE)


def _import(endpoint: str, data: bytes, image: str) -> None:
    repository, _, tag = image.partition(":")
    with contextlib.closing(docker.APIClient(base_url=endpoint, version="1.41", timeout=120)) as sdk:
        sdk.import_image_from_data(data, repository=repository, tag=tag, changes=["ENV PATH=/usr/local/bin:/usr/bin"])
