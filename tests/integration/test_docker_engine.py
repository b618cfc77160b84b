"""The Docker engine with a real daemon, on a machine of the test's own: who there is, and what is done to them."""

from __future__ import annotations

import asyncio
import io
import tarfile
import time

import pytest

from clawker_cp.engines.base import Publish
from clawker_cp.engines.docker import network as agents_network
from clawker_cp.engines.docker.containers import identity_problem
from clawker_cp.engines.docker.engine import DockerEngine
from clawker_cp.errors import CapacityExceeded, Conflict, DeadlineExceeded, NotFound, Unavailable
from clawker_cp.testing.docker_following import LIMIT_S, engine_of, followed
from clawker_cp.testing.docker_world import DockerWorld, missing
from clawker_cp.testing.world import HostNamespace

pytestmark = [
    pytest.mark.root, pytest.mark.docker, pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

NET = agents_network.NAME


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
