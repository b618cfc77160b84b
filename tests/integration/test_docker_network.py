"""The agents' network of a real daemon: made, adopted, or refused with the reason."""

from __future__ import annotations

import asyncio
import json

import docker as sdk
import pytest

from clawker_cp.config import NetworkSettings, Octets
from clawker_cp.engines.docker import network as agents_network
from clawker_cp.engines.docker.network import ensure_network
from clawker_cp.engines.docker.siblings import ENVOY, Sibling
from clawker_cp.engines.docker.stack import SiblingProcess
from clawker_cp.errors import Conflict, NotFound, Unavailable
from clawker_cp.testing import docker_world
from clawker_cp.testing.docker_world import DockerWorld, missing

pytestmark = [
    pytest.mark.root, pytest.mark.docker, pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

NET = agents_network.NAME


async def test_network_is_made_once_with_room_for_the_static_addresses(docker: DockerWorld) -> None:
    """The first start makes `clawker-net` with the configured subnet; the next one adopts it; the bridge is there."""
    first = await ensure_network(docker.client, NetworkSettings(), own_container_id=None)
    again = await ensure_network(docker.client, NetworkSettings(subnet="10.99.0.0/16"), own_container_id=None)
    record = await docker.client.inspect_network(NET)

    assert first == again
    assert first.subnet == "10.231.96.0/20"
    assert (first.proxy, first.dns, first.cp) == (first.gateway,) * 3 == ("10.231.96.1",) * 3
    assert record["IPAM"]["Config"][0]["IPRange"] == "10.231.104.0/21"
    assert record["Labels"]["dev.clawker.managed"] == "true"
    links = json.loads((await docker.host.run(["ip", "-j", "addr", "show", "dev", first.bridge])).out)
    assert "10.231.96.1" in [info["local"] for info in links[0]["addr_info"]]


async def test_control_plane_container_gets_its_static_address(docker: DockerWorld) -> None:
    """As a container it joins the network at its octet, finds itself there again, and the proxy may be a sibling."""
    own = await docker.run("clawker-controlplane", "sleep", "1000")
    network = await ensure_network(docker.client, NetworkSettings(), own_container_id=own)
    again = await ensure_network(docker.client, NetworkSettings(), own_container_id=own, stack="container")

    assert (network.proxy, network.dns, network.cp) == ("10.231.96.202",) * 3
    assert (again.proxy, again.dns, again.cp) == ("10.231.96.200", "10.231.96.202", "10.231.96.202")


async def _nobody(_container: str) -> None:
    raise AssertionError("nothing is admitted that does not run")


async def test_network_without_a_subnet_of_ours_gives_what_the_engine_assigns(docker: DockerWorld) -> None:
    """
    On an adopted network the engine refuses static addresses: the assigned one is read back and used (R2). A proxy of
    its own cannot be had there, for its address is part of what agents are told before it runs.
    """
    client = await asyncio.to_thread(sdk.APIClient, base_url=docker.endpoint, version="1.41")
    await asyncio.to_thread(
        client.create_network, NET, driver="bridge", options={"com.docker.network.bridge.name": "ck-adopted"}
    )
    client.close()
    own = await docker.run("clawker-controlplane", "sleep", "1000")
    network = await ensure_network(docker.client, NetworkSettings(), own_container_id=own)
    record = await docker.client.inspect(own)
    beside = await ensure_network(docker.client, NetworkSettings(), own_container_id=own, stack="container")
    sibling = Sibling(ENVOY, docker_world.IMAGE, beside.proxy, ("sleep", "1000"), (), {}, "0:0")
    with pytest.raises(Conflict, match=r"clawker-envoy cannot have .*\.200: clawker-net was made without") as refused:
        await SiblingProcess(docker.client, beside, sibling, admit=_nobody).start("")
    with pytest.raises(NotFound):
        await docker.client.inspect(ENVOY)

    assert "docker network rm clawker-net" in (refused.value.hint or "")
    assert network.bridge == "ck-adopted"
    assert network.cp == record["NetworkSettings"]["Networks"][NET]["IPAddress"] != ""
    assert network.cp.rpartition(".")[2] != "202"


@pytest.mark.parametrize(
    ("ipam", "settings", "words"),
    [
        ([{"Subnet": "10.9.9.0/28", "Gateway": "10.9.9.1"}], NetworkSettings(), "no free address"),
        ([{"Subnet": "10.9.9.0/24", "Gateway": "10.9.9.202"}], NetworkSettings(), "no free address"),
    ],
)
async def test_network_that_has_no_place_for_us_is_a_start_error(
    docker: DockerWorld, ipam: list[dict[str, str]], settings: NetworkSettings, words: str
) -> None:
    """A static address outside the adopted subnet, or the gateway's own, is told with the setting."""
    await docker.client.create_network(NET, ipam=ipam, labels={})
    own = await docker.run("clawker-controlplane", "sleep", "1000")
    with pytest.raises(Conflict, match=words):
        await ensure_network(docker.client, settings, own_container_id=own)


async def test_two_networks_of_the_name_and_a_taken_subnet_are_told(docker: DockerWorld) -> None:
    """The engine lets two networks have one name, and refuses a subnet in use: both name what to do."""
    await docker.client.create_network("other", ipam=[{"Subnet": "10.231.96.0/24"}], labels={})
    with pytest.raises(Conflict, match=r"network\.subnet: the engine refuses 10\.231\.96\.0/20"):
        await ensure_network(docker.client, NetworkSettings(), own_container_id=None)
    client = await asyncio.to_thread(sdk.APIClient, base_url=docker.endpoint, version="1.41")
    for _ in range(2):
        await asyncio.to_thread(client.create_network, NET, driver="bridge", check_duplicate=False)
    client.close()
    with pytest.raises(Conflict, match="2 networks called clawker-net"):
        await ensure_network(docker.client, NetworkSettings(), own_container_id=None)


async def test_address_that_is_in_use_is_told(docker: DockerWorld) -> None:
    """Somebody else at our static address is a conflict, not another address by surprise."""
    await ensure_network(docker.client, NetworkSettings(), own_container_id=None)
    await docker.run(
        "squatter", "sleep", "1000", host_config={"NetworkMode": NET},
        NetworkingConfig={"EndpointsConfig": {NET: {"IPAMConfig": {"IPv4Address": "10.231.96.202"}}}},
    )  # fmt: skip
    own = await docker.run("clawker-controlplane", "sleep", "1000")
    with pytest.raises((Conflict, Unavailable), match="(?i)address already in use"):
        await ensure_network(docker.client, NetworkSettings(octets=Octets()), own_container_id=own)
