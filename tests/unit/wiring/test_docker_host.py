"""One daemon as the server has it: where its containers' cgroups appear, who comes in, where the host proxy is."""

from __future__ import annotations

from pathlib import Path

import pytest

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.engine import DockerEngine
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.host import cgroups
from clawker_cp.wiring import docker_host as module
from clawker_cp.wiring.docker_host import DockerHost, host_proxy_address

NETWORK = AgentNetwork("n", "10.231.96.0/20", "10.231.96.1", "br-x", "10.231.96.1", "10.231.96.1", "10.231.96.1")


def make(tmp_path: Path, *, driver: str = "cgroupfs", default_parent: str = "", parent: str = "x.slice") -> DockerHost:
    client = DockerClient(f"unix://{tmp_path}/none.sock")
    return DockerHost(
        client, DockerEngine(client, NETWORK), None,
        host_pid=1, parent=parent, driver=driver, default_parent=default_parent,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("driver", "default_parent", "names"),
    [("cgroupfs", "", ["docker"]), ("systemd", "", ["system.slice"]), ("cgroupfs", "/mine", ["mine", "docker"])],
)
def test_where_cgroups_appear(tmp_path: Path, driver: str, default_parent: str, names: list[str]) -> None:
    """By the daemon's driver, and where it was told to put containers."""
    host = make(tmp_path, driver=driver, default_parent=default_parent)
    assert [path.name for path in host.cgroup_parents()] == names


async def test_a_daemon_that_is_gone_is_said(tmp_path: Path) -> None:
    """The engine's health is a question asked now; the answer names the socket."""
    host = make(tmp_path)
    assert "none.sock" in await host.answers()
    await host.client.aclose()


async def test_the_host_proxy_is_at_the_gateway_on_a_host() -> None:
    """Only a container has a name for the host; without one it is the gateway as well (contract 1.3)."""
    assert await host_proxy_address(NETWORK, in_container=False) == NETWORK.gateway


async def test_the_host_proxy_of_a_container_is_what_the_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first IPv4 address of host.docker.internal as this process resolves it, the gateway when it does not."""
    monkeypatch.setattr(module, "HOST_NAME", "localhost")
    assert await host_proxy_address(NETWORK, in_container=True) == "127.0.0.1"
    monkeypatch.setattr(module, "HOST_NAME", "no-such-name.invalid")
    assert await host_proxy_address(NETWORK, in_container=True) == NETWORK.gateway


def test_an_agents_parent_that_cannot_be_made_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cgroupfs is read-only and the parent is not there, containers are linked one by one."""
    monkeypatch.setattr(cgroups, "find_cgroup2", lambda: tmp_path / "not" / "there")
    assert make(tmp_path).parent_cgroup is None


def test_inbound_is_what_the_setting_says(tmp_path: Path) -> None:
    """`published` means something for containers, other than for sandboxes."""
    assert make(tmp_path).inbound("published") == "published"
