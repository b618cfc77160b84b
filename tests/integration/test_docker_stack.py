"""
Envoy and CoreDNS as containers of a real engine: adopted, replaced, restarted by the engine, and what a stop leaves.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog

from clawker_cp.config import Directories, Settings
from clawker_cp.engines.docker.network import addresses, read_plan
from clawker_cp.engines.docker.siblings import COREDNS, ENVOY, SPEC, Sibling
from clawker_cp.engines.docker.stack import SiblingProcess
from clawker_cp.errors import Conflict, NotFound, Unavailable, Unsupported
from clawker_cp.firewall.envoy.stack import EnvoyStack
from clawker_cp.firewall.inspection import InspectionAuthority
from clawker_cp.testing.docker_machine import NETWORK, DockerMachine, docker_machine
from clawker_cp.testing.docker_world import DockerWorld, image_archive, missing
from clawker_cp.testing.image_registry import image_registry
from clawker_cp.testing.peers import WHY, peer
from clawker_cp.testing.plan_world import build, rule
from clawker_cp.testing.served import serving
from clawker_cp.testing.stack_images import COREDNS_IMAGE, ENVOY_IMAGE, import_stack_images
from clawker_cp.testing.stack_images import settings as stack_settings
from clawker_cp.testing.world_names import DNS_SERVER, SECOND_DNS_SERVER
from clawker_cp.wiring.docker_host import DockerHost, docker_host
from clawker_cp.wiring.placement import Placement
from clawker_cp.wiring.stack_choice import Stack, chosen_stack

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.envoy, pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"), pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

# Asks over one connection, waits for a file, and asks over the same again.
PATIENT = """
import http.client, os, time
it = http.client.HTTPConnection("api.example.com", timeout=30)
for path, go in (("/first", "/tmp/go"), ("/second", "")):
    it.request("GET", path)
    answer = it.getresponse()
    answer.read()
    print(answer.status, id(it.sock), flush=True)
    if go:
        open("/tmp/asked", "w").close()
    while go and not os.path.exists(go):
        time.sleep(0.05)
"""
# Health and numbers of both, the proxy's view, and a name that CoreDNS would resolve: any port 53 is the gate's.
TRIED = """
import socket
for where, port in ((there, 18902), (there, 9153), (proxy, 9902), (gateway, 9953)):
    try:
        socket.create_connection((where, port), 2)
    except OSError:
        print("no")
question = bytes.fromhex("1234010000010000000000000377777707") + b"example\\x03com\\0\\0\\1\\0\\1"
asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asked.settimeout(3)
asked.sendto(question, (there, 53))
print(asked.recv(512)[3] & 15)
"""
GATEWAY = "10.231.96.1"
CURL = ("/usr/bin/curl", "-sS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[DockerMachine]:
    async with docker_machine(live_restore=True) as machine:
        await import_stack_images(machine.docker)
        yield machine


class Driven:
    """The stack as a control plane has it, more than one after another on the same files."""

    def __init__(self, host: DockerHost, directory: Path) -> None:
        self.host = host
        self.directories = Directories(
            config=directory / "config", data=directory / "data", state=directory / "state", cache=directory / "cache"
        )
        self.admitted: list[str] = []
        self.authority = InspectionAuthority(self.directories.firewall / "certs")

    def choose(self, **envoy: Any) -> Stack:
        settings = _settings(**envoy)
        return chosen_stack(settings, self.directories, self.host, Placement(), {}, admit=self.admit)

    async def started(self, **envoy: Any) -> tuple[EnvoyStack, SiblingProcess]:
        stack = self.choose(**envoy)
        await stack.prepare()
        assert isinstance(stack.process, SiblingProcess)
        driver = EnvoyStack(stack.options, stack.process, self.authority)
        await driver.start(build(rule("https://api.example.com")).plan)
        return driver, stack.process

    async def record(self) -> dict[str, Any]:
        return await self.host.client.inspect(ENVOY)

    async def admit(self, container: str) -> None:
        self.admitted.append(container)


def _settings(**envoy: Any) -> Settings:
    import msgspec

    raw = {
        "stack": "container",
        "engine": "docker",
        "envoy": {"image": ENVOY_IMAGE, **envoy},
        "dns": {"coredns_image": COREDNS_IMAGE},
    }
    return msgspec.convert(raw, Settings)


@pytest_asyncio.fixture(loop_scope="module")
async def driven(machine: DockerMachine, tmp_path: Path) -> AsyncIterator[Driven]:
    docker: DockerWorld = machine.docker
    directories = Directories(config=tmp_path, data=tmp_path / "data", state=tmp_path, cache=tmp_path)
    async with docker_host(_settings(), directories, docker.environment()) as host:
        driven = Driven(host, tmp_path)
        driven.authority.open()
        try:
            yield driven
        finally:
            for name in (ENVOY, COREDNS):
                try:
                    await host.client.remove(name, force=True)
                except NotFound:
                    continue


async def test_the_next_control_plane_adopts_it(driven: Driven) -> None:
    """Same spec: the same process carries on, with a configuration that the next one has written and seen taken."""
    first, process = await driven.started()
    pid = process.pid
    record = await driven.record()
    await first.leave()
    second, held = await driven.started()
    count = await second.apply(build(rule("https://api.example.com"), rule("https://b.example.com")).plan)

    assert second.adopted and held.pid == pid and held.running and count > 0
    assert driven.admitted == [record["Id"]] * 2
    assert record["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert record["HostConfig"]["ReadonlyRootfs"] and record["HostConfig"]["CapDrop"] == ["ALL"]
    assert record["Config"]["Labels"]["dev.clawker.purpose"] == "firewall"
    (endpoint,) = record["NetworkSettings"]["Networks"].values()
    assert endpoint["IPAddress"] == driven.host.network.proxy != driven.host.network.gateway
    assert record["NetworkSettings"]["Ports"]["9902/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": "18901"}]
    assert (driven.directories.firewall / "envoy" / "admin.sock").stat().st_mode & 0o777 == 0o600
    await second.stop()
    with pytest.raises(NotFound):
        await driven.record()


async def test_another_spec_replaces_it_and_says_so(driven: Driven) -> None:
    """Drift: with other settings the old container is stopped and removed, and a new one made."""
    first, process = await driven.started()
    before = await driven.record()
    await first.leave()
    with structlog.testing.capture_logs() as lines:
        second, held = await driven.started(concurrency=1)
    after = await driven.record()

    assert not second.adopted and held.pid != process.pid
    assert before["Id"] != after["Id"]
    assert before["Config"]["Labels"][SPEC] != after["Config"]["Labels"][SPEC]
    assert [line["name"] for line in lines if line["event"] == "firewall_container_spec_drift"] == [ENVOY]
    await second.stop()


async def test_a_stranger_of_the_name_is_replaced_but_never_ended_by_a_stop(
    driven: Driven, machine: DockerMachine
) -> None:
    """The name is ours when we start; a stop removes only what we made."""
    stranger = await machine.docker.run(ENVOY, "sleep", "1000")
    stack = driven.choose()
    await stack.process.stop()
    still = await driven.record()
    with structlog.testing.capture_logs() as lines:
        driver, _ = await driven.started()
    now = await driven.record()

    assert still["Id"] == stranger and still["State"]["Running"]
    assert now["Id"] != stranger
    assert [line["id"] for line in lines if line["event"] == "firewall_container_replaced"] == [stranger[:12]]
    await driver.stop()


async def test_a_crash_is_undone_and_seen(driven: Driven) -> None:
    """
    Killed, it comes back with the policy it had; supervision counts it and waits until it serves. With nobody there
    the engine does it, and the next control plane adopts what came back.
    """
    driver, process = await driven.started()
    pid = process.pid
    async with asyncio.TaskGroup() as group:
        supervision = group.create_task(driver.supervise())
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            while not (driver.restarts and process.pid not in {0, pid} and await driver.is_healthy()):
                await asyncio.sleep(0.05)
        count = await driver.apply(build(rule("https://other.example.com")).plan)
        await driver.leave()
        await supervision
    second = (await driven.record())["State"]["Pid"]
    os.kill(second, signal.SIGKILL)
    async with asyncio.timeout(30):
        while (record := await driven.record())["State"]["Pid"] in {0, second} or not record["State"]["Running"]:
            await asyncio.sleep(0.05)
    again, held = await driven.started()

    assert driver.restarts == 1 and count > 0
    assert again.adopted and held.pid not in {pid, second} and await again.is_healthy()
    assert set(driven.admitted) == {record["Id"]}
    await again.stop()


async def test_frozen_or_stopped_it_is_woken(driven: Driven) -> None:
    """The same container, paused or stopped by hand while nobody watched, serves again after the next start."""
    driver, process = await driven.started()
    container = (await driven.record())["Id"]
    await driver.leave()
    await driven.host.client.pause(ENVOY)
    resumed, _ = await driven.started()
    healthy = await resumed.is_healthy()
    await resumed.leave()
    await driven.host.client.stop(ENVOY)
    again, held = await driven.started()

    assert resumed.adopted and healthy and not again.adopted
    assert (await driven.record())["Id"] == container and held.pid != process.pid
    await again.stop()


async def test_what_cannot_be_started_says_why_and_leaves_nothing(driven: Driven, machine: DockerMachine) -> None:
    """No image, or an address that somebody has: an error for people, and no container that comes back by itself."""
    with pytest.raises(Unsupported, match="does not have the image nobody/has:this"):
        await driven.started(image="nobody/has:this")
    proxy = driven.host.network.proxy
    squatter = await machine.docker.run("squatter", "sleep", "1000", start=False)
    await driven.host.client.connect(driven.host.network.id, squatter, address=proxy)
    await driven.host.client.start(squatter)
    with pytest.raises(Unavailable, match="clawker-envoy cannot be started: .*in use"):
        await driven.started()
    with pytest.raises(NotFound):
        await driven.record()
    await driven.host.client.remove(squatter, force=True)


async def test_an_image_may_be_named_by_digest(driven: Driven, machine: DockerMachine) -> None:
    """Pulled by digest it is that image's content that runs, and is adopted; another digest is not to be had."""
    client, network = driven.host.client, driven.host.network
    async with image_registry(machine.machine.host, image_archive()) as reference:
        pulled = await machine.machine.host.run(["docker", "pull", reference], env=machine.machine.environment)
    assert pulled.code == 0, pulled.err
    sibling = Sibling(ENVOY, reference, network.proxy, ("/bin/sleep", "1000"), (), {}, "0:0")
    process = SiblingProcess(client, network, sibling, admit=driven.admit)
    adopted = [await process.start("digest") for _ in range(2)]
    record, image = await driven.record(), await client.image_inspect(reference)
    await process.stop()
    other = replace(sibling, image=reference[:-64] + reference[:-65:-1])

    assert adopted == [False, True]
    assert record["Image"] == image["Id"] and record["Config"]["Labels"]["dev.clawker.image"] == reference
    with pytest.raises(Unsupported, match="does not have the image 127.0.0.1:5000/one@sha256:"):
        await SiblingProcess(client, network, other, admit=driven.admit).start("digest")


async def test_a_network_without_a_subnet_of_its_own_is_said(driven: Driven) -> None:
    """The engine gives no static address there: one line with the way out, and no container is left."""
    client = driven.host.client
    await client.create_network("plain", ipam=[], labels={})
    try:
        (found,) = await client.list_networks("plain")
        plan = read_plan(await client.inspect_network(found["Id"]))
        plain = addresses(plan, own=None, proxy=plan.static(200))
        sibling = Sibling(ENVOY, ENVOY_IMAGE, plain.proxy, ("envoy",), (), {}, "0:0")
        with pytest.raises(Conflict, match=f"clawker-envoy cannot have {plain.proxy}") as refused:
            await SiblingProcess(client, plain, sibling, admit=driven.admit).start("")
        with pytest.raises(NotFound):
            await driven.record()
    finally:
        await client.remove_network("plain")

    assert refused.value.hint and "docker network rm clawker-net" in refused.value.hint, refused.value.message


async def test_a_server_without_the_image_ends_and_says_what_to_do(machine: DockerMachine) -> None:
    """One line that names the image and one that says how to get it; no container, pin or table stays."""
    environment = {**machine.machine.environment, **stack_settings(), "CLAWKER_CP_ENVOY__IMAGE": "nobody/has:this"}
    host = machine.machine.host
    done = await host.run([sys.executable, "-m", "clawker_cp", "serve"], env=environment, timeout_s=60)
    tables = (await host.run(["nft", "list", "tables"])).out
    pins = (await host.run(["ls", "/sys/fs/bpf"])).out
    containers = await machine.docker.client.list_containers(every=True)

    assert done.code == 3, done.err
    said = done.err.splitlines()[-2:]
    assert "the engine does not have the image nobody/has:this of clawker-envoy" in said[0]
    assert said[1].strip() == "hint: docker pull nobody/has:this, or set stack to embedded"
    assert "clawker" not in tables and "clawker" not in pins and containers == []


@pytest.mark.skipif(peer("coredns") is None, reason=WHY)
async def test_agents_are_served_by_containers_across_a_kill(machine: DockerMachine) -> None:
    """
    Served by the two containers, each zone by its own forwarder, and past a dead CoreDNS; a connection outlives a
    kill -9 of the control plane; taken down, network, maps and rules stay and nothing passes.
    """
    machine.machine.environment |= stack_settings()
    config = Path(machine.machine.environment["CLAWKER_CONFIG_DIR"])
    config.mkdir(parents=True, exist_ok=True)
    (config / "control-plane.yaml").write_text(f"dns: {{zones: {{example.org: [{SECOND_DNS_SERVER}]}}}}\n")
    client, world = machine.docker.client, machine.machine.world
    async with serving(machine.machine) as served:
        for name in ("api.example.com", "git.example.org"):
            done = await machine.ctl("allow", f"http://{name}")
            assert done.code == 0, done.err
        agent = await machine.docker.agent("dev", network=NETWORK, usr=True)
        await machine.wait_enrolled(agent)
        reached = await machine.inside(agent, *CURL, "http://api.example.com/x")
        zoned = await machine.inside(agent, *CURL, "http://git.example.org/x")
        denied = await machine.inside(agent, *CURL, "http://www.example.com/x")
        names = {(query["name"].lower(), query["dst"]) for query in await world.queries()}
        envoy, coredns = await client.inspect(ENVOY), await client.inspect(COREDNS)
        components = json.loads((await served.get("http://127.0.0.1:7080/healthz?verbose=1"))[1])["components"]
        asked = await machine.machine.host.run(
            ["curl", "-sS", "-m", "3", f"http://{_address(coredns)}:9153/metrics"], env=machine.machine.environment
        )
        where = f"there, proxy = {_address(coredns)!r}, {_address(envoy)!r}; gateway = {GATEWAY!r}"
        tried = await machine.python(agent, f"{where}\n{TRIED}")
        patient = asyncio.ensure_future(machine.python(agent, PATIENT))
        async with asyncio.timeout(20):
            while (await machine.inside(agent, "/usr/bin/test", "-e", "/tmp/asked")).code:
                await asyncio.sleep(0.05)
        await client.kill(COREDNS)
        without = await machine.inside(agent, *CURL, "http://api.example.com/y")
        served.process.kill()
        await served.process.wait()
        alone = await client.inspect(ENVOY)
    async with serving(machine.machine):
        await machine.wait_enrolled(agent)
        adopted = await client.inspect(ENVOY)
        again = await machine.inside(agent, *CURL, "http://api.example.com/z")
        await machine.inside(agent, "/usr/bin/touch", "/tmp/go")
        outlived = (await patient).out.splitlines()
        await client.remove(agent, force=True)
        async with asyncio.timeout(20):
            while await machine.agents():
                await asyncio.sleep(0.05)
        down = await machine.ctl("firewall", "down")
        left = await client.list_containers(every=True)
        rules = await machine.told("rules", "list")
        networks = await client.list_networks(NETWORK)
    await world.reset()

    assert (reached.code, reached.out) == (zoned.code, zoned.out) == (0, "200"), reached.err + zoned.err
    assert {one for one in names if one[0] in {"api.example.com", "git.example.org", "www.example.com"}} == {
        ("api.example.com", DNS_SERVER),
        ("git.example.org", SECOND_DNS_SERVER),
    }
    assert denied.code == 6
    assert components["envoy"]["implementation"] == "container"
    assert components["dns"]["implementation"] == "gate+coredns"
    assert "coredns_dns_requests_total{" in asked.out
    assert tried.out.split() == ["no", "no", "no", "no", "3"], tried.err
    assert (without.code, without.out) == (0, "200"), without.err
    assert alone["State"]["Pid"] == envoy["State"]["Pid"] == adopted["State"]["Pid"]
    assert (again.code, again.out) == (0, "200"), again.err
    assert len(outlived) == 2 and outlived[0] == outlived[1] and outlived[0].startswith("200 "), outlived
    assert down.code == 0, down.err
    assert [one["Names"] for one in left if one["Names"] == [f"/{ENVOY}"]] == []
    assert len(networks) == 1 and "api.example.com" in json.dumps(rules)


def _address(record: dict[str, Any]) -> str:
    (endpoint,) = record["NetworkSettings"]["Networks"].values()
    return str(endpoint["IPAddress"])
