"""
What root in a stock container tries against other agents, the proxy and the host: with frames of its own making.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp.testing.docker_machine import NETWORK, DockerMachine, docker_machine
from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.served import Served, serving
from clawker_cp.testing.world_names import API, DATAGRAMS

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.envoy, pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"), pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

FRAMES = Path(__file__).with_name("raw_frames.py")
GATEWAY = "10.231.96.1"
LISTENER = """
import socket, sys
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("up", flush=True)
while True:
    peer, _ = listener.accept()
    peer.settimeout(1)
    try:
        peer.sendall(b"data")
        print("got", peer.recv(64), flush=True)
    except OSError:
        print("got", None, flush=True)
    peer.close()
"""
PULL = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 2) as peer:
        print(peer.recv(9).decode() or "closed")
except OSError:
    print("refused")
"""


@dataclass
class Yard:
    """Two agents of two projects: `shop` has rules, `blog` has none and is the attacker."""

    machine: DockerMachine
    served: Served
    shop: str
    blog: str
    address: str  # shop's

    async def frames(self, container: str, *words: str) -> str:
        done = await self.machine.inside(container, "/usr/bin/python3", "/frames/raw_frames.py", *words)
        return done.out.strip() or done.err[-500:]

    async def pull(self, address: str, port: int) -> str:
        """Connect from the host and read."""
        done = await self.machine.machine.host.run(["/usr/bin/python3", "-c", PULL, address, str(port)])
        return done.out.strip()

    async def packets(self) -> list[Any]:
        """What came out, the gate's questions and the proxy's own connections left out."""
        return [one for one in await self.machine.machine.world.packets() if one["dport"] != 53]

    def binds(self) -> dict[str, Any]:
        return {"NetworkMode": NETWORK, "Binds": [f"{self.machine.machine.workdir}:/frames:ro"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def yard() -> AsyncIterator[Yard]:
    async with docker_machine() as machine, serving(machine.machine) as served:
        (machine.machine.workdir / FRAMES.name).write_bytes(FRAMES.read_bytes())
        made = Yard(machine, served, "", "", "")
        for rule in ("udp://udp.example.com:9001", "tcp://db.example.com:5432", f"tcp://{API}/32:6379"):
            done = await machine.ctl("allow", rule, "--project", "shop")
            assert done.code == 0, done.err
        published = {"PortBindings": {"8001/tcp": [{"HostIp": "", "HostPort": "18001"}]}, **made.binds()}
        made.shop = await machine.docker.agent(
            "dev", "/usr/bin/python3", "-c", LISTENER, "8001", project="shop", usr=True,
            host_config=published, ExposedPorts={"8001/tcp": {}},
        )  # fmt: skip
        made.blog = await machine.docker.agent("dev", project="blog", usr=True, host_config=made.binds())
        for one in (made.shop, made.blog):
            await machine.wait_enrolled(one)
        made.address = next(one["address"] for one in await machine.agents() if one["project"] == "shop")
        yield made


async def until(what: Callable[[], Awaitable[bool]], limit_s: float = 15.0) -> None:
    """Ask again until it is so."""
    async with asyncio.timeout(limit_s):
        while not await what():
            await asyncio.sleep(0.05)


async def test_a_rule_for_addresses_is_kept_by_both_layers(yard: Yard) -> None:
    """What a CIDR rule passes leaves a container directly: kernel and ring agree from its enrolment on."""
    code = f"import socket; s = socket.create_connection(({API!r}, 6379), 5); s.send(b'hello'); print(s.recv(9))"
    done = await yard.machine.python(yard.shop, code)
    other = await yard.machine.python(yard.blog, code)

    assert done.out.strip() == "b'hello'", done.err
    assert other.code == 1


async def test_a_denied_address_in_an_allowed_network_is_closed_to_frames(yard: Yard) -> None:
    """The ring alone judges what no socket made: from the moment of the deny it has a hole in the network."""
    machine, denied = yard.machine, "203.0.113.66"
    done = await machine.ctl("allow", "tcp://203.0.113.64/28:6379", "--project", "holes")
    assert done.code == 0, done.err
    container = await machine.docker.agent("dev", project="holes", usr=True, host_config=yard.binds())
    await machine.wait_enrolled(container)
    await machine.machine.world.reset()
    await yard.frames(container, "tcp", denied, "6379", GATEWAY)
    before = [one for one in await yard.packets() if one["dst"] == denied]
    done = await machine.ctl("deny", f"tcp://{denied}/32:6379", "--project", "holes")
    assert done.code == 0, done.err
    await machine.machine.world.reset()
    after = await yard.frames(container, "tcp", denied, "6379", GATEWAY)
    packets = [one for one in await yard.packets() if one["dst"] == denied]
    flows = await machine.flows("--agent", "holes/dev", "--last", "100")
    await machine.docker.client.remove(container, force=True)

    assert before  # the frame is a good one
    assert after == "silence" and packets == []
    assert (6379, "no_route") in {(one["port"], one["reason"]) for one in flows if one.get("hook") == "ring"}


async def test_nobody_begins_at_a_listener_of_another_policy(yard: Yard) -> None:
    """Row 20 with frames: TCP and UDP to another project's proxy ports never reach the proxy (A sees none of it)."""
    await yard.machine.machine.world.reset()
    own = [await yard.frames(yard.shop, *words) for words in (("udp", GATEWAY, "11001"), ("tcp", GATEWAY, "10001"))]

    async def arrived() -> bool:
        return DATAGRAMS in {one["dst"] for one in await yard.packets()}

    await until(arrived)  # the frames are good ones: the owner of the listeners gets through with them
    await yard.machine.machine.world.reset()
    theirs = [await yard.frames(yard.blog, *words) for words in (("udp", GATEWAY, "11001"), ("tcp", GATEWAY, "10001"))]
    flows = await yard.machine.flows("--agent", "blog/dev", "--last", "100")

    assert own[0] == "sent" and own[1] != "silence"
    assert theirs == ["sent", "silence"]
    assert await yard.packets() == []
    assert {(one["port"], one["reason"]) for one in flows if one.get("hook") == "ring"} >= {
        (11001, "no_route"), (10001, "no_route"),
    }  # fmt: skip


async def test_services_of_the_host_among_the_proxys_ports_are_closed(yard: Yard) -> None:
    """Row 4: a service that the host runs on 0.0.0.0 is no listener of the proxy, whatever its port number."""
    host = yard.machine.machine.host
    service = await host.start(["/usr/bin/python3", "-c", LISTENER, "15000"], stdout=asyncio.subprocess.PIPE)
    assert service.stdout is not None and await service.stdout.readline() == b"up\n"
    answers = [await yard.frames(one, "tcp", GATEWAY, "15000") for one in (yard.shop, yard.blog)]
    service.kill()
    left = await service.stdout.read()
    await service.wait()

    assert answers == ["silence", "silence"] and left == b""


async def test_a_published_port_is_no_way_to_a_sibling(yard: Yard) -> None:
    """Row 5: the host and nobody else: not a sibling by socket or frame, nor the world (`firewall.inbound: host`)."""

    async def host_answers() -> bool:
        return await yard.pull("127.0.0.1", 18001) == "data"

    await until(host_answers)
    by_socket = [
        (await yard.machine.inside(yard.blog, "/usr/bin/python3", "-c", PULL, address, port)).out.strip()
        for address, port in ((GATEWAY, "18001"), (yard.address, "8001"), ("192.0.2.1", "18001"))
    ]
    by_frame = [await yard.frames(yard.blog, "tcp", GATEWAY, "18001")]
    world = yard.machine.machine.world.pid
    outside = await asyncio.create_subprocess_exec(
        "nsenter", "-t", str(world), "-n", "/usr/bin/python3", "-c", PULL, "192.0.2.1", "18001",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    answered, _ = await outside.communicate()

    assert by_socket == ["refused"] * 3 and by_frame == ["silence"]
    assert answered.strip() in {b"refused", b"closed"}


async def test_frames_with_what_is_not_ones_own_go_nowhere(yard: Yard) -> None:
    """Rows 11 and 36: another's address or MAC, the gateway's, tags, RA, LLDP: dropped, recorded, neighbours intact."""
    mac = (await yard.machine.docker.client.inspect(yard.shop))["NetworkSettings"]["Networks"][NETWORK]["MacAddress"]
    await yard.machine.machine.world.reset()
    before = await yard.frames(yard.shop, "who_has", GATEWAY)
    sent = [
        await yard.frames(yard.blog, "spoof", yard.address, GATEWAY, "11001"),
        await yard.frames(yard.blog, "spoof", yard.address, GATEWAY, "11001", mac),
        await yard.frames(yard.blog, "spoof", GATEWAY, GATEWAY, "53"),
        await yard.frames(yard.blog, "poison", GATEWAY, yard.address),
        await yard.frames(yard.blog, "poison", yard.address, GATEWAY),
        await yard.frames(yard.blog, "odd", GATEWAY),
    ]
    after = await yard.frames(yard.shop, "who_has", GATEWAY)
    sibling = await yard.frames(yard.blog, "who_has", yard.address)
    neighbours = (await yard.machine.machine.host.run(["ip", "-j", "neigh", "show", yard.address])).out
    routes = (await yard.machine.inside(yard.shop, "ip", "-6", "route")).out
    reasons = {one["reason"] for one in await yard.machine.flows("--last", "500") if one.get("hook") == "ring"}

    assert sent == ["sent"] * 6
    assert await yard.packets() == []
    assert before == after and sibling == "silence"
    assert mac in neighbours and "default" not in routes
    assert {"malformed", "protocol", "ipv6_unrouted"} <= reasons


async def test_admin_ports_answer_no_agent(yard: Yard) -> None:
    """Row 31: neither sockets nor frames reach AdminService, metrics, the authority's admin side or Envoy's health."""
    ports = ("7443", "4445", "7081", "9902", "9953", "18901", "18902")
    code = f"""
import socket
for address in ({GATEWAY!r}, "192.0.2.1", "127.0.0.1"):
    for port in {ports!r}:
        try:
            socket.create_connection((address, int(port)), 1)
            print("reached", address, port)
        except OSError:
            pass
"""
    done = await yard.machine.python(yard.blog, code)
    frames = [await yard.frames(yard.blog, "tcp", GATEWAY, port) for port in ports[:2]]

    assert (done.code, done.out) == (0, "")
    assert frames == ["silence"] * 2


async def test_a_container_that_is_no_agent_meets_none(yard: Yard) -> None:
    """Somebody's own container on the network reaches no agent and is reached by none; the gate answers it nothing."""
    other = await yard.machine.docker.run(
        "other", "/usr/bin/python3", "-c", LISTENER, "10001", usr=True, host_config=yard.binds()
    )
    record = await yard.machine.docker.client.inspect(other)
    address = record["NetworkSettings"]["Networks"][NETWORK]["IPAddress"]

    async def open_() -> bool:
        return await yard.pull(address, 10001) == "data"

    await until(open_)  # it has a network of its own
    to_agent = (await yard.machine.inside(other, "/usr/bin/python3", "-c", PULL, yard.address, "8001")).out.strip()
    by_frame = await yard.frames(other, "who_has", yard.address)
    from_agent = [
        (await yard.machine.inside(yard.shop, "/usr/bin/python3", "-c", PULL, address, "10001")).out.strip(),
        await yard.frames(yard.shop, "who_has", address),
    ]
    asked = await yard.machine.inside(other, "nslookup", "api.example.com", GATEWAY, timeout_s=30)
    await yard.machine.docker.client.remove(other, force=True)

    assert to_agent == "refused" and by_frame == "silence"
    assert from_agent == ["refused", "silence"]
    assert API not in asked.out
