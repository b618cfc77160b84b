"""Acting inside a container's network namespace, never in the host's."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawker_cp.engines.docker.namespaces import OWN, cut_inside, host_addresses
from clawker_cp.errors import NotFound

pytestmark = pytest.mark.root


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"cktest-{os.getpid()}-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "addr", "add", "198.51.100.7/32", "dev", "lo"], check=True)
        yield Path("/run/netns", name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def never(_: object) -> bool:
    raise AssertionError("a socket of the host was looked at")


def test_sockets_of_the_host_are_left_alone(netns: Path) -> None:
    """A container in the host's network namespace has nothing cut: those sockets are everybody's."""
    assert cut_inside(OWN, None, never) == 0
    assert cut_inside(netns, netns, never) == 0


def test_namespace_that_is_gone_is_told() -> None:
    """A container that ended meanwhile is not found."""
    with pytest.raises(NotFound):
        cut_inside(Path(f"/proc/{2**22 + 1}/ns/net"), None, never)


async def test_host_addresses_are_those_of_the_hosts_namespace(netns: Path) -> None:
    """A control plane in a namespace of its own lists the host's interfaces, not its own."""
    assert await host_addresses(netns) == ["198.51.100.7"]
    assert "198.51.100.7" not in await host_addresses(None)
