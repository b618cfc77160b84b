"""The Docker engine with a real daemon, on a machine of the test's own."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import docker as sdk
import pytest
import pytest_asyncio

from clawker_cp.config import NetworkSettings, Octets
from clawker_cp.engines.base import Publish
from clawker_cp.engines.docker import network as agents_network
from clawker_cp.engines.docker.containers import identity_problem
from clawker_cp.engines.docker.engine import DockerEngine
from clawker_cp.engines.docker.network import ensure_network
from clawker_cp.engines.docker.siblings import ENVOY, Sibling
from clawker_cp.engines.docker.stack import SiblingProcess
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.dockerevents import DockerEvent, DockerEventFeeder
from clawker_cp.errors import CapacityExceeded, Conflict, DeadlineExceeded, NotFound, Unavailable
from clawker_cp.testing import docker_world
from clawker_cp.testing.docker_world import DockerWorld
from clawker_cp.testing.world import HostNamespace

pytestmark = [pytest.mark.root, pytest.mark.docker, pytest.mark.slow]

NET = agents_network.NAME
LIMIT_S = 30


def _earned() -> None:
    if lacking := docker_world.missing():
        pytest.skip(lacking)


@pytest_asyncio.fixture
async def docker() -> AsyncIterator[DockerWorld]:
    _earned()
    async with HostNamespace() as host, DockerWorld(host) as world:
        yield world


async def engine_of(world: DockerWorld, **options: Any) -> DockerEngine:
    return DockerEngine(
        world.client, await ensure_network(world.client, NetworkSettings(), own_container_id=None), **options
    )


class Followed:
    """What a feeder published, and waiting for a part of it."""

    def __init__(self, client: DockerClient, engine: DockerEngine | None) -> None:
        self.seen: list[DockerEvent] = []
        self.changes: list[str] = []
        self._engine = engine
        self._news = asyncio.Event()
        self.feeder = DockerEventFeeder(client, self._take, changed=self.changes.append)

    def _take(self, event: DockerEvent) -> None:
        self.seen.append(event)
        if self._engine is not None:
            self._engine.take_event(event)
        self._news.set()

    async def until(self, wanted: Callable[[DockerEvent], bool]) -> DockerEvent:
        async with asyncio.timeout(LIMIT_S):
            while True:
                for event in self.seen:
                    if wanted(event):
                        return event
                self._news.clear()
                await self._news.wait()

    async def action(self, action: str, number: str) -> DockerEvent:
        return await self.until(lambda event: event.action == action and event.container_id == number)

    def actions(self, number: str) -> list[str]:
        return [event.action for event in self.seen if event.kind == "container" and event.id == number]


@asynccontextmanager
async def followed(world: DockerWorld, engine: DockerEngine | None = None) -> AsyncIterator[Followed]:
    following = Followed(world.client, engine)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(following.feeder.run())
        try:
            async with asyncio.timeout(LIMIT_S):
                await following.feeder.following.wait()
            yield following
        finally:
            task.cancel()


# -- network ---------------------------------------------------------------------------------------


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


# -- who there is ----------------------------------------------------------------------------------


async def test_agents_are_described_by_record_and_kernel(docker: DockerWorld) -> None:
    """Only managed agents live; each has its cgroup with its process in it, its address, and its published ports."""
    engine = await engine_of(docker)
    made = await docker.agent(
        "dev", network=NET, host_config={"PortBindings": {"8000/tcp": [{"HostPort": "18000"}]}},
        ExposedPorts={"8000/tcp": {}},
    )  # fmt: skip
    await docker.run(
        "clawker-envoy", "sleep", "1000", labels={"dev.clawker.managed": "true", "dev.clawker.purpose": "firewall"}
    )
    await docker.run("stranger", "sleep", "1000", labels={"dev.clawker.agent": "x", "dev.clawker.purpose": "agent"})
    paused = await docker.agent("asleep", project="", network=NET)
    await engine.pause(paused)
    stopped = await docker.agent("stopped", network=NET, start=False)
    living = {container.id: container for container in await engine.living()}
    agent = living[made]

    assert set(living) == {made, paused}
    assert (agent.project, agent.agent, agent.name) == ("p", "dev", "clawker.p.dev")
    assert (living[paused].project, living[paused].paused, living[paused].name) == ("", True, "clawker.asleep")
    assert agent.address.startswith("10.231.10") and agent.publish == (Publish(18000, 8000),)
    assert agent.cgroup_path == docker.cgroup / made
    assert agent.cgroup_id == agent.cgroup_path.stat().st_ino
    assert str(agent.pid) in (agent.cgroup_path / "cgroup.procs").read_text().split()
    assert agent.exposures == ()
    assert agent.command == ("sleep", "1000") and abs(agent.started_at_unix - time.time()) < 60
    assert not (await engine.inspect(stopped)).running
    assert (await engine.inspect("clawker-envoy")).is_agent is False


async def test_parent_of_the_owners_choice_and_cgroups_inside_are_followed(docker: DockerWorld) -> None:
    """A container under another parent, whose process moved itself into a cgroup below, is found by its own."""
    engine = await engine_of(docker)
    docker.host.agents.mkdir()
    made = await docker.agent("dev", network=NET, host_config={"CgroupParent": f"/{docker.host.agents.name}"})
    pid = (await engine.inspect(made)).pid
    inner = docker.host.agents / made / "inner"
    inner.mkdir()
    (inner / "cgroup.procs").write_text(str(pid))

    agent = await engine.inspect(made)
    assert (agent.cgroup_path, agent.pid) == (docker.host.agents / made, pid)


async def test_default_parent_of_the_engine_is_followed() -> None:
    """Where the engine is left its own choice, containers are found as well, and only they are taken away."""
    _earned()
    async with HostNamespace() as host, DockerWorld(host, default_parent=True) as world:
        made = await world.agent("dev")
        engine = await engine_of(world)
        path = (await engine.inspect(made)).cgroup_path

        assert path == host.mount / "docker" / made
    assert path is not None and not path.exists()


async def test_references_mean_one_container_or_nobody(docker: DockerWorld) -> None:
    """Full id, a prefix of 12 or more, and the name find it; anything shorter, unknown or odd finds nobody."""
    engine = await engine_of(docker)
    made = await docker.agent("dev", network=NET)
    for reference in (made, made[:12], made[:40], "clawker.p.dev"):
        assert (await engine.inspect(reference)).id == made
    for reference in (made[:11], made[:4], "clawker.p", "0" * 64, "", "../info", "a b", made + "0"):
        with pytest.raises(NotFound):
            await engine.inspect(reference)


async def test_odd_labels_are_described_and_told(docker: DockerWorld) -> None:
    """An agent whose labels make no name lives and is told as one that has no identity."""
    engine = await engine_of(docker)
    made = await docker.agent("dev", network=NET, labels={"dev.clawker.agent": "../../x", "dev.clawker.project": "p q"})
    nameless = await docker.agent("dev", name="nameless", network=NET, labels={"dev.clawker.agent": ""})

    assert "'../../x', not a name" in identity_problem(await engine.inspect(made))
    assert "missing" in identity_problem(await engine.inspect(nameless))
    assert {container.id for container in await engine.living()} == {made, nameless}


async def test_exposures_come_from_the_real_record(docker: DockerWorld) -> None:
    """What an owner gave away shows up from the daemon's own record, volumes in disguise and company included."""
    own = docker.host.directory / "config"
    own.mkdir()
    work = docker.host.directory / "work"
    work.mkdir()
    engine = await engine_of(docker, own=[own])
    await docker.client.create_network("lab", ipam=[{"Subnet": "10.77.0.0/24"}], labels={})
    given = await docker.agent(
        "given", network=NET, labels={"dev.clawker.workdir": str(work)},
        host_config={
            "CapAdd": ["SYS_ADMIN", "NET_RAW"], "PidMode": "host",
            "Binds": [f"{docker.directory / 'docker.sock'}:/var/run/docker.sock:ro", f"{work}:/work", f"{own}:/c:ro"],
            "Devices": [{"PathOnHost": "/dev/zero", "PathInContainer": "/dev/zero", "CgroupPermissions": "r"}],
            "Mounts": [{"Type": "volume", "Source": "sly", "Target": "/sly", "VolumeOptions": {
                "DriverConfig": {"Name": "local", "Options": {"type": "none", "o": "bind", "device": "/etc"}}}}],
        },
    )  # fmt: skip
    await docker.client.connect("lab", given)
    await docker.run("sidecar", "sleep", "1000", host_config={"NetworkMode": f"container:{given}"})
    plain = await docker.agent("plain", network=NET)
    # Not started: a machine that is a container itself may have no privileges to give.
    privileged = await docker.agent("privileged", start=False, host_config={"Privileged": True, "NetworkMode": "host"})

    assert set((await engine.inspect(given)).exposures) == {
        "capability:SYS_ADMIN", "host_pid", "engine_socket", "mount:/etc", f"mount:{own}", "second_network:lab",
        "shared_network:sidecar",
    }  # fmt: skip
    assert (await engine.inspect(plain)).exposures == ()
    assert (await engine.inspect(privileged)).exposures == ("host_network", "privileged")


# -- addresses -------------------------------------------------------------------------------------


async def test_address_leads_to_its_agent_and_is_asked_for_once(docker: DockerWorld) -> None:
    """Many who ask at once share one question; the answer is remembered; strangers' addresses are nobody's."""
    engine = await engine_of(docker)
    made = await docker.agent("dev", network=NET)
    await docker.run("stranger", "sleep", "1000", host_config={"NetworkMode": NET})
    address = (await docker.client.inspect(made))["NetworkSettings"]["Networks"][NET]["IPAddress"]
    other = (await docker.client.inspect("stranger"))["NetworkSettings"]["Networks"][NET]["IPAddress"]
    before = docker.client.statistics()["answered"]
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(engine.running_at(address)) for _ in range(50)]
    questions = docker.client.statistics()["answered"] - before

    assert {tuple(container.id for container in task.result()) for task in asked} == {(made,)}
    assert questions <= 3
    assert [container.id for container in await engine.running_at(address)] == [made]
    assert docker.client.statistics()["answered"] - before == questions
    assert await engine.running_at(other) == []
    assert await engine.running_at("10.231.111.254") == []
    assert engine.statistics()["remembered"] == 1


async def test_shared_address_is_that_of_both_agents(docker: DockerWorld) -> None:
    """Two agents in one network namespace are two matches: the caller refuses, whoever was asked for first."""
    engine = await engine_of(docker)
    async with followed(docker, engine) as events:
        first = await docker.agent("first", network=NET)
        address = (await engine.inspect(first)).address
        assert [container.id for container in await engine.running_at(address)] == [first]
        second = await docker.agent("second", host_config={"NetworkMode": f"container:{first}"})
        await events.action("start", second)
        assert {container.id for container in await engine.running_at(address)} == {first, second}
        assert {container.id for container in await engine.running_at(address)} == {first, second}


async def test_freed_address_is_nobodys_before_any_event_says_so(docker: DockerWorld) -> None:
    """A killed agent's address is not answered from memory, although the engine's event never arrived."""
    engine = await engine_of(docker)
    made = await docker.agent("dev", network=NET)
    agent = await engine.inspect(made)
    assert await engine.running_at(agent.address) == [agent]
    await docker.client.kill(made)
    await docker.client.wait(made, limit_s=LIMIT_S)

    assert await engine.running_at(agent.address) == []


async def test_events_keep_addresses_right(docker: DockerWorld) -> None:
    """Leaving the network, renaming and coming back are seen by the next look-up."""
    engine = await engine_of(docker)
    async with followed(docker, engine) as events:
        made = await docker.agent("dev", network=NET)
        address = (await engine.inspect(made)).address
        await docker.client.rename(made, "clawker.p.renamed")
        await events.action("rename", made)
        assert [container.name for container in await engine.running_at(address)] == ["clawker.p.renamed"]
        await docker.client.disconnect(NET, made)
        await events.action("disconnect", made)
        assert await engine.running_at(address) == []
        await docker.client.connect(NET, made, address="10.231.96.77")
        await events.until(lambda event: event.action == "connect" and event is events.seen[-1])
        assert [container.id for container in await engine.running_at("10.231.96.77")] == [made]


async def test_failed_and_cancelled_questions_do_not_stick(docker: DockerWorld) -> None:
    """Who waits for a question whose asker is cancelled asks anew; a frozen daemon is told within the limit."""
    engine = await engine_of(docker)
    made = await docker.agent("dev", network=NET)
    address = (await docker.client.inspect(made))["NetworkSettings"]["Networks"][NET]["IPAddress"]
    docker.freeze_daemon(on=True)
    async with asyncio.TaskGroup() as group:
        leader = group.create_task(engine.running_at(address))
        await asyncio.sleep(0)
        follower = group.create_task(engine.running_at(address))
        await asyncio.sleep(0)
        leader.cancel()
        await asyncio.sleep(0)
        docker.freeze_daemon(on=False)
        assert [container.id for container in await follower] == [made]
    docker.freeze_daemon(on=True)
    engine.forget()
    began = time.monotonic()
    with pytest.raises(Unavailable):
        await engine.running_at(address)
    assert time.monotonic() - began < 9
    docker.freeze_daemon(on=False)
    assert [container.id for container in await engine.running_at(address)] == [made]


# -- verbs -----------------------------------------------------------------------------------------


async def test_ends_are_waited_for_without_a_thread(docker: DockerWorld) -> None:
    """More waits than threads end with their codes, told by events; one that ended is told at once."""
    engine = await engine_of(docker)
    async with followed(docker, engine):
        made = [await docker.agent(f"a{number}", "sh", "-c", "sleep 1000") for number in range(10)]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            waits = [group.create_task(engine.wait(number)) for number in made]
            await docker.client.ping()
            for number in made:
                await engine.kill(number)
        assert [task.result() for task in waits] == [137] * 10
        assert await engine.wait(made[0]) == 137
        code = await docker.agent("seven", "sh", "-c", "exit 7")
        assert await engine.wait(code) == 7
        await docker.client.remove(code)
        with pytest.raises(NotFound):
            await engine.wait(code)


async def test_verbs_on_the_wrong_state_are_conflicts_and_on_nobody_not_found(docker: DockerWorld) -> None:
    """Pausing twice, killing the dead, a name in use, removing a running one, and ids that are gone."""
    engine = await engine_of(docker)
    made = await docker.agent("dev", network=NET)
    await engine.pause(made)
    with pytest.raises(Conflict):
        await engine.pause(made)
    await engine.unpause(made)
    with pytest.raises(Conflict):
        await engine.unpause(made)
    with pytest.raises(Conflict):
        await docker.agent("dev", network=NET)
    with pytest.raises(Conflict):
        await docker.client.remove(made)
    await docker.client.start(made)
    await docker.client.stop(made, grace_s=0)
    await docker.client.stop(made)
    with pytest.raises(Conflict):
        await engine.kill(made)
    with pytest.raises(Conflict):
        await docker.client.remove_network("bridge")
    await docker.client.remove(made)
    for verb in (engine.inspect, engine.pause, engine.unpause, engine.kill, engine.wait, docker.client.remove):
        with pytest.raises(NotFound):
            await verb(made)
    with pytest.raises(NotFound):
        await docker.client.image_inspect("none:1")
    with pytest.raises(DeadlineExceeded):
        await docker.client.wait(await docker.agent("long"), limit_s=0.2)


async def test_files_and_output_of_a_container(docker: DockerWorld) -> None:
    """Files are put in before the first start and fetched after the end; the last lines of output are kept."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("seed")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"hello"))
    made = await docker.run("files", "sh", "-c", "cat /tmp/seed; echo; echo two; echo out > /tmp/out", start=False)
    await docker.client.put_archive(made, "/tmp", buffer.getvalue())
    await docker.client.start(made)
    assert await docker.client.wait(made, limit_s=LIMIT_S) == 0
    assert await docker.client.logs(made) == b"hello\ntwo\n"
    assert await docker.client.logs(made, lines=1) == b"two\n"
    with tarfile.open(fileobj=io.BytesIO(await docker.client.get_archive(made, "/tmp/out"))) as tar:
        found = tar.extractfile("out")
        assert found is not None and found.read() == b"out\n"
    with pytest.raises(CapacityExceeded):
        await docker.client.get_archive(made, "/bin/busybox", most=1000)
    with pytest.raises(NotFound):
        await docker.client.get_archive(made, "/none")
    with pytest.raises(NotFound):
        await docker.client.put_archive(made, "/none", buffer.getvalue())


async def test_connections_of_a_container_are_cut_and_only_those(docker: DockerWorld) -> None:
    """The sockets that match are destroyed in the container's namespace; the machine's own are never touched."""
    engine = await engine_of(docker)
    server = (
        "import socket; s=socket.create_server(('0.0.0.0', 9)); c=s.accept()[0]; print('in', flush=True); c.recv(1)"
    )
    listener = await docker.run(
        "listener", "/usr/bin/python3", "-c", server, usr=True, host_config={"NetworkMode": NET}
    )
    there = (await engine.inspect(listener)).address
    code = f"""
import socket, time
while True:
    try:
        s = socket.create_connection(({there!r}, 9), 5)
        break
    except OSError:
        time.sleep(0.05)
s.settimeout(60)
try:
    s.recv(1)
    print("ended")
except ConnectionAbortedError:
    print("cut")
"""
    made = await docker.agent("dev", "/usr/bin/python3", "-c", code, network=NET, usr=True)
    async with asyncio.timeout(LIMIT_S):
        while b"in" not in await docker.client.logs(listener):
            await asyncio.sleep(0.02)
    assert await engine.cut(made, lambda info: info.destination_port == 10) == 0
    assert await engine.cut(made, lambda info: (info.destination, info.destination_port) == (there, 9)) == 1
    assert await engine.wait(made) == 0
    assert await docker.client.logs(made) == b"cut\n"
    assert await engine.cut(made, lambda _: True) == 0
    in_host = DockerEngine(docker.client, engine.network, host_netns=docker.host.netns)
    exposed = await docker.agent("exposed", network="host")
    assert await in_host.cut(exposed, lambda _: True) == 0


async def test_host_addresses_are_the_machines(docker: DockerWorld) -> None:
    """The addresses of the machine's interfaces, the agents' gateway among them, are read in its namespace."""
    engine = await engine_of(docker)
    there = DockerEngine(docker.client, engine.network, host_netns=docker.host.netns)

    assert engine.gateway in await there.host_addresses()


# -- events and the daemon's life ------------------------------------------------------------------


async def test_events_of_a_life_come_in_order_with_labels(docker: DockerWorld) -> None:
    """Create to destroy, network joins included, each with the engine's message and the container's labels."""
    engine = await engine_of(docker)
    async with followed(docker, engine) as events:
        made = await docker.agent("dev", network=NET)
        await docker.client.pause(made)
        await docker.client.unpause(made)
        await docker.client.remove(made, force=True)
        last = await events.action("destroy", made)
        joined = [event for event in events.seen if event.kind == "network" and event.container_id == made]

    assert events.actions(made) == ["create", "start", "pause", "unpause", "kill", "die", "destroy"]
    assert [event.action for event in joined] == ["connect", "disconnect"]
    assert last.attributes["dev.clawker.agent"] == "dev"
    assert last.name == "clawker.p.dev"
    assert json.loads(last.raw)["Actor"]["ID"] == made
    assert not any(event.synthetic for event in events.seen)


async def test_container_started_while_subscribing_is_never_missed(docker: DockerWorld) -> None:
    """Containers that start around the moment of subscribing are all told, by list or by event (R25)."""
    made: list[str] = []

    async def busy() -> None:
        for number in range(6):
            made.append(await docker.agent(f"a{number}"))

    async with asyncio.TaskGroup() as group:
        group.create_task(busy())
        while len(made) < 2:
            await asyncio.sleep(0.01)
        async with followed(docker) as events:
            async with asyncio.timeout(60):
                while len(made) < 6:
                    await asyncio.sleep(0.02)
            for number in made:
                await events.action("start", number)


@pytest.mark.parametrize("live_restore", [False, True])
async def test_daemon_killed_and_started_again_is_followed_over_the_gap(live_restore: bool) -> None:
    """After kill -9 of dockerd, what ended or vanished meanwhile is told, what lives on is known, and events go on."""
    _earned()
    async with HostNamespace() as host, DockerWorld(host, live_restore=live_restore) as world:
        engine = await engine_of(world)
        stays = await world.agent("stays", network=NET)
        leaves = await world.agent("leaves", network=NET)
        async with followed(world, engine) as events:
            await events.action("start", leaves)
            pid = (await engine.inspect(leaves)).pid
            await world.kill_daemon()
            async with asyncio.timeout(LIMIT_S):
                while not events.changes:
                    await asyncio.sleep(0.02)
            with pytest.raises(Unavailable):
                await engine.living()
            assert not events.feeder.following.is_set()
            (host.mount / world.cgroup_parent / leaves / "cgroup.kill").write_text("1")
            await world.start_daemon()
            await events.action("die", leaves)
            if not live_restore:
                await events.action("die", stays)
            async with asyncio.timeout(LIMIT_S):
                await events.feeder.following.wait()
            late = await world.agent("late", network=NET)
            assert not (await events.action("start", late)).synthetic
            living = {container.id for container in await engine.living()}

        assert living == ({stays, late} if live_restore else {late})
        assert events.changes[0] != "" and events.changes[-1] == ""
        assert "destroy" not in events.actions(stays)
        assert pid > 0


async def test_container_removed_while_nobody_followed_is_told_as_destroyed(docker: DockerWorld) -> None:
    """What vanished between two connections gets a destroy with its last labels; what came is told too."""
    gone = await docker.agent("gone")
    following = Followed(docker.client, None)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(following.feeder.run())
        await following.action("start", gone)
        task.cancel()
    await docker.client.remove(gone, force=True)
    await docker.stop_daemon()  # forgets its events
    await docker.start_daemon()
    new = await docker.agent("new")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(following.feeder.run())
        destroyed = await following.action("destroy", gone)
        await following.action("start", new)
        task.cancel()

    assert destroyed.attributes["dev.clawker.agent"] == "gone"
    assert following.actions(gone).count("destroy") == 1


async def test_frozen_daemon_frees_callers_at_the_limit_and_comes_back(docker: DockerWorld) -> None:
    """A daemon that stops running while calls are under way costs each its limit, no thread, and works again after."""
    client = DockerClient(docker.endpoint, threads=2, limit_s=0.5)
    try:
        await client.ping()
        docker.freeze_daemon(on=True)
        failures = []

        async def ask() -> None:
            try:
                await client.ping()
            except Unavailable as error:
                failures.append(error)

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(ask())
        docker.freeze_daemon(on=False)
        assert len(failures) == 6
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    await client.ping()
                    break
                except Unavailable:
                    continue
    finally:
        docker.freeze_daemon(on=False)
        await client.aclose()


async def test_daemon_restarted_under_a_call_is_unavailable(docker: DockerWorld) -> None:
    """A call that waits while the daemon is killed fails at once, not at its limit; the next one works."""
    made = await docker.agent("dev")
    async with asyncio.TaskGroup() as group:
        outcome: list[str] = []

        async def wait() -> None:
            try:
                await docker.client.wait(made, limit_s=LIMIT_S)
            except Unavailable:
                outcome.append("unavailable")

        group.create_task(wait())
        while docker.client.statistics()["under_way"] == 0:
            await asyncio.sleep(0)
        await docker.client.ping()
        began = time.monotonic()
        await docker.kill_daemon()
    assert outcome == ["unavailable"]
    assert time.monotonic() - began < 10
    await docker.start_daemon()
    assert (await docker.client.inspect(made))["Id"] == made


async def test_world_leaves_nothing_behind_when_its_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon whose set-up breaks half-way is gone, with its cgroups and files."""
    _earned()
    monkeypatch.setattr(docker_world, "image_archive", lambda: (_ for _ in ()).throw(RuntimeError("no image")))
    async with HostNamespace() as host:
        world = DockerWorld(host)
        with pytest.raises(RuntimeError, match="no image"):
            async with world:
                raise AssertionError("it started")
        assert world.pid == 0
        assert not list(Path("/sys/fs/cgroup").glob(f"*/{world.cgroup_parent}"))
        with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError):
            probe.connect(str(world.directory / "docker.sock"))
