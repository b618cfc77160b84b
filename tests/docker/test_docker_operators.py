"""
What owners and operators do to containers, meaning well: networks, sharing, labels, slots, bypass, quarantine.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import pytest_asyncio

from clawker_cp.testing.certificates import TestCa
from clawker_cp.testing.daemon_program import daemon_program
from clawker_cp.testing.docker_machine import NETWORK, DockerMachine, docker_machine
from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.served import Served, serving
from clawker_cp.testing.world_names import API, EVIL

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.envoy, pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"), pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

CURL = ("/usr/bin/curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "http://api.example.com/x")
# Says once a second's tenth whether an address without a rule answers.
KNOCK = f"""
import socket
try:
    with socket.create_connection(({EVIL!r}, 6379), 2) as peer:
        peer.sendall(b"escaped-knock")
        print("reached", peer.recv(13))
except OSError as error:
    print("refused", error.errno)
"""
SERVE = """
import socket, threading
def serve(port):
    listener = socket.create_server(("0.0.0.0", port))
    while True:
        peer, _ = listener.accept()
        peer.sendall(b"data")
        peer.close()
threading.Thread(target=serve, args=(8002,), daemon=True).start()
serve(8001)
"""
PULL = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 2) as peer:
        print(peer.recv(9).decode() or "refused")
except OSError:
    print("refused")
"""
RESTLESS = f"""
import socket, time
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for address in (({EVIL!r}, 5000), ({EVIL!r}, 443)):
        try:
            u.sendto(b"escaped-restless", address)
        except OSError:
            pass
        try:
            socket.create_connection(({EVIL!r}, 6379), 0.1).send(b"escaped-restless")
        except OSError:
            pass
    time.sleep(0.005)
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[DockerMachine]:
    async with docker_machine(live_restore=True) as made:
        made.machine.environment["CLAWKER_CP_FIREWALL__MAX_AGENTS"] = "4"
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(machine: DockerMachine) -> AsyncIterator[Served]:
    async with serving(machine.machine) as served:
        done = await machine.ctl("allow", "http://api.example.com")
        assert done.code == 0, done.err
        yield served


async def until(what: Callable[[], Awaitable[bool]], limit_s: float = 20.0) -> None:
    """Ask again until it is so."""
    async with asyncio.timeout(limit_s):
        while not await what():
            await asyncio.sleep(0.05)


async def start(machine: DockerMachine, agent: str, *argv: str, **options: Any) -> str:
    options.setdefault("network", NETWORK)
    container = await machine.docker.agent(agent, *argv, usr=True, **options)
    await machine.wait_enrolled(container)
    return container


async def docker(machine: DockerMachine, *words: str) -> str:
    """The engine's own command line, as its users call it."""
    done = await machine.machine.host.run(["docker", *words], env=machine.machine.environment, timeout_s=60)
    assert done.code == 0, done.err
    return done.out.strip()


async def session(machine: DockerMachine, container: str) -> dict[str, Any]:
    return next((one for one in await machine.agents() if one["container_id"] == container), {})


async def remove(machine: DockerMachine, *containers: str) -> None:
    for container in containers:
        await machine.docker.client.remove(container, force=True)

    async def gone() -> bool:
        return not {one["container_id"] for one in await machine.agents()} & set(containers)

    await until(gone)


async def test_nothing_opens_whatever_the_engine_does_to_a_container(machine: DockerMachine, served: Served) -> None:
    """Row 28: HUP, pause, rename, update, restart, network off and on while it never stops trying: no byte gets out."""
    await machine.machine.world.reset()
    container = await start(machine, "restless", "/usr/bin/python3", "-c", RESTLESS)
    first = (await session(machine, container))["address"]
    await docker(machine, "kill", "-s", "CONT", container)
    for words in (("pause",), ("unpause",), ("update", "--cpu-shares", "512")):
        await docker(machine, *words, container)
    await docker(machine, "rename", container, "renamed")
    await docker(machine, "network", "disconnect", NETWORK, container)
    await docker(machine, "network", "connect", NETWORK, container)
    await until(lambda: _reaches(machine, container))
    await docker(machine, "network", "disconnect", NETWORK, container)
    await docker(machine, "network", "connect", "--ip", "10.231.97.77", NETWORK, container)
    await until(lambda: _reaches(machine, container))
    moved = await session(machine, container)
    await docker(machine, "restart", "-t", "0", container)
    await machine.wait_enrolled(container)
    await until(lambda: _reaches(machine, container))
    # HUP ends a process that does not handle it: the container is gone, and so are its rows.
    await docker(machine, "kill", "-s", "HUP", container)
    packets = await machine.machine.world.packets(dst=EVIL)
    await remove(machine, container)

    assert first != moved["address"] == "10.231.97.77"
    assert packets == []


async def _reaches(machine: DockerMachine, container: str) -> bool:
    return (await machine.inside(container, *CURL)).out == "200"


async def test_a_second_network_is_covered_and_told_whenever_it_comes(machine: DockerMachine, served: Served) -> None:
    """Row 34: sockets are judged on any network; one attached to a running agent is shown like one from the start."""
    await docker(machine, "network", "create", "--subnet", "203.0.113.192/28", "aside")
    try:
        container = await start(machine, "second")
        before = (await session(machine, container)).get("exposures", [])
        await docker(machine, "network", "connect", "aside", container)

        async def told() -> bool:
            return "second_network:aside" in (await session(machine, container)).get("exposures", [])

        await until(told, 10)
        tried = await machine.python(container, KNOCK.replace(EVIL, "203.0.113.193"))
        await docker(machine, "network", "disconnect", "aside", container)

        async def forgotten() -> bool:
            return not (await session(machine, container)).get("exposures", [])

        await until(forgotten, 10)
        await remove(machine, container)
    finally:
        await docker(machine, "network", "rm", "aside")

    assert before == []
    assert tried.out.startswith("refused")


async def test_a_shared_network_namespace_opens_nothing_and_closes_nobody(
    machine: DockerMachine, served: Served
) -> None:
    """Sidecars of an agent are told; an end of one leaves the other its network; frames of both are an agent's."""
    owner = await start(machine, "owner")
    sidecar = await machine.docker.run(
        "sidecar", "sleep", "1000", usr=True, host_config={"NetworkMode": f"container:{owner}"}
    )

    async def told() -> bool:
        return "shared_network:sidecar" in (await session(machine, owner)).get("exposures", [])

    await until(told, 10)
    tried = await machine.python(sidecar, KNOCK)
    await machine.docker.client.remove(sidecar, force=True)
    second = await start(machine, "guest", network=f"container:{owner}")
    as_guest = await machine.python(second, KNOCK)
    await remove(machine, second)
    await until(lambda: _reaches(machine, owner))
    await remove(machine, owner)

    assert tried.out.startswith("refused") and as_guest.out.startswith("refused")


async def test_an_agent_behind_somebody_elses_port_is_an_agent_to_the_ring(
    machine: DockerMachine, served: Served
) -> None:
    """The neighbour's free network ends while an agent shares its namespace, whatever happens to the neighbour."""
    neighbour = await machine.docker.run("neighbour", "sleep", "1000", usr=True, host_config={"NetworkMode": NETWORK})

    async def free() -> bool:
        return (await machine.python(neighbour, KNOCK)).out.startswith("reached")

    await until(free)
    guest = await start(machine, "guest", network=f"container:{neighbour}")
    await docker(machine, "rename", "neighbour", "neighbour2")
    shown = await session(machine, guest)
    during = [(await machine.python(one, KNOCK)).out[:7] for one in (guest, neighbour)]
    await remove(machine, guest)
    await until(free)
    await machine.docker.client.remove(neighbour, force=True)

    assert during == ["refused", "refused"]
    assert any(one.startswith("shared_network:") for one in shown["exposures"])


async def test_what_cannot_be_enrolled_is_denied_and_shown(machine: DockerMachine, served: Served) -> None:
    """Host network, no network, labels that are no name: denied, listed as not enrolled, told by the agents' health."""
    odd = {
        "hostnet": await machine.docker.agent("hostnet", usr=True, network="host"),
        "nonet": await machine.docker.agent("nonet", usr=True, network="none"),
        "label": await machine.docker.agent(
            "label", usr=True, network=NETWORK, labels={"dev.clawker.agent": "../../x y"}, name="odd-label"
        ),
    }

    async def shown() -> bool:
        return {one["container_id"] for one in await machine.agents()} >= set(odd.values())

    await until(shown)
    listed = {name: await session(machine, container) for name, container in odd.items()}
    tried = [(await machine.python(container, KNOCK)).out[:7] for container in odd.values()]

    async def degraded() -> bool:
        told = await machine.told("status")
        return any(
            one["name"] == "agents" and "could not be enrolled" in one.get("detail", "") for one in told["components"]
        )

    await until(degraded)
    await remove(machine, *odd.values())

    assert tried == ["refused"] * 3
    assert [one.get("enrolled", False) for one in listed.values()] == [False] * 3
    assert listed["hostnet"]["exposures"] == ["host_network"]


async def test_equal_labels_are_two_agents_of_one_policy(machine: DockerMachine, served: Served) -> None:
    """Both are enforced; a reference by name is refused as ambiguous, and the end of one leaves the other its rules."""
    twins = [await start(machine, "twin", name=f"twin-{number}") for number in range(2)]
    reached = [await _reaches(machine, one) for one in twins]
    ambiguous = await machine.ctl("quarantine", "p/twin", "--reason", "test")
    await remove(machine, twins[0])
    after = await _reaches(machine, twins[1])
    await remove(machine, twins[1])

    assert reached == [True, True] and after
    assert ambiguous.code != 0 and "twin" in ambiguous.err


async def test_more_agents_than_slots_wait_for_one(machine: DockerMachine, served: Served) -> None:
    """Row 27: the agent that found no slot is denied, shown with the limit, and enrolled soon after one is free."""
    first = [await start(machine, f"slot{number}") for number in range(4)]
    late = await machine.docker.agent("late", usr=True, network=NETWORK)

    async def refused() -> bool:
        told = await machine.told("status")
        return any(one["name"] == "agents" and late[:12] in one.get("detail", "") for one in told["components"])

    await until(refused)
    tried = await machine.python(late, KNOCK)
    await remove(machine, first[0])
    await machine.wait_enrolled(late)
    await until(lambda: _reaches(machine, late))
    await remove(machine, late, *first[1:])

    assert tried.out.startswith("refused")


REGISTER = daemon_program("10.231.96.1")


async def test_an_agents_certificate_is_good_from_its_container_only(machine: DockerMachine, served: Served) -> None:
    """Row 30: the leaf of one container, sent from another's address, is refused; from its own it registers."""
    victim, thief = await start(machine, "victim"), await start(machine, "thief")
    place = machine.machine.workdir / "boot"
    place.mkdir()
    auth = Path(machine.machine.environment["CLAWKER_DATA_DIR"]) / "auth"
    ca = TestCa.of(place, auth / "ca" / "ca.pem", auth / "ca" / "ca.key")
    (place / "ca.pem").write_bytes(ca.certificate.read_bytes())
    uris = ["urn:clawker:agent:clawker.p.victim", f"urn:clawker:container:{victim}"]
    ca.leaf("clawker-clawkerd", file="leaf", uris=uris)

    async def register(container: str) -> list[str]:
        """From the container's network namespace and cgroup, with this interpreter's gRPC."""
        now = int(time.time())
        claims = {
            "iss": "clawker-agent", "sub": "clawker-agent", "aud": "https://127.0.0.1:4444/oauth2/token",
            "jti": str(uuid.uuid4()), "iat": now, "exp": now + 600,
        }  # fmt: skip
        assertion = jwt.encode(claims, (auth / "cli" / "signing.key").read_bytes(), algorithm="ES256")
        pid = (await machine.docker.client.inspect(container))["State"]["Pid"]
        enter = f'echo $$ > {machine.docker.cgroup / container}/cgroup.procs && exec nsenter -t {pid} -n -- "$@"'
        argv = [sys.executable, "-c", REGISTER, str(place), assertion, "victim", "p"]
        done = await machine.machine.host.run(["sh", "-c", enter, "enter", *argv], timeout_s=40)
        assert done.code == 0, done.err[-2000:]
        return list(json.loads(done.out))

    stolen = await register(thief)
    own = await register(victim)
    await remove(machine, victim, thief)

    assert stolen == ["PERMISSION_DENIED", "registration rejected"]
    assert own == ["OK", ""]


async def test_a_quarantined_container_has_the_control_plane_only(machine: DockerMachine, served: Served) -> None:
    """Its connections are cut, names are refused, also after it was restarted; a release gives its rules back."""
    container = await start(machine, "isolated")
    await until(lambda: _reaches(machine, container))
    done = await machine.ctl("quarantine", "p/isolated", "--reason", "test")
    assert done.code == 0, done.err
    isolated = (await machine.inside(container, *CURL)).out
    await docker(machine, "restart", "-t", "0", container)
    await machine.wait_enrolled(container)
    restarted = (await machine.inside(container, *CURL)).out
    refused = await machine.ctl("bypass", "p/isolated", "--for", "5s")
    done = await machine.ctl("release", "p/isolated")
    assert done.code == 0, done.err
    await until(lambda: _reaches(machine, container))
    await remove(machine, container)

    assert {isolated, restarted} <= {"", "000"}
    assert refused.code != 0 and "release it first" in refused.err


async def test_a_cgroup_parent_of_the_owners_choice_opens_nothing(machine: DockerMachine, served: Served) -> None:
    """Below the agents' parent, deeper below it, or inside another agent's cgroup: enforced, or denied and shown."""
    parent = machine.machine.host.agents.name
    below = await start(machine, "below", host_config={"NetworkMode": NETWORK, "CgroupParent": f"/{parent}"})
    parents = {"deeper": f"/{parent}/deeper", "inside": f"/{machine.docker.cgroup_parent}/{below}"}
    odd = [
        await machine.docker.agent(name, usr=True, host_config={"NetworkMode": NETWORK, "CgroupParent": place})
        for name, place in parents.items()
    ]
    stranger = await machine.docker.run(
        "stranger", "sleep", "1000", usr=True, host_config={"NetworkMode": NETWORK, "CgroupParent": f"/{parent}"}
    )
    await until(lambda: _reaches(machine, below))
    tried = [(await machine.python(one, KNOCK)).out[:7] for one in (below, *odd, stranger)]

    async def shown() -> bool:
        return {one["container_id"] for one in await machine.agents()} >= {below, *odd}

    await until(shown)
    await machine.docker.client.remove(stranger, force=True)
    await remove(machine, *odd, below)

    assert tried == ["refused"] * 4


async def test_a_bypass_passes_the_engines_rules_and_ends_without_us(machine: DockerMachine, served: Served) -> None:
    """Direct egress by FORWARD and MASQUERADE for its time; the server killed meanwhile, it ends all the same (I3)."""
    container = await start(machine, "bypassed")
    before = await machine.python(container, KNOCK)
    done = await machine.ctl("bypass", "p/bypassed", "--for", "8s")
    assert done.code == 0, done.err
    during = await machine.python(container, KNOCK)
    served.process.send_signal(signal.SIGKILL)
    await served.process.wait()

    async def ended() -> bool:
        return (await machine.python(container, KNOCK)).out.startswith("refused")

    still = await machine.python(container, KNOCK)
    await until(ended)
    async with serving(machine.machine):
        await machine.wait_enrolled(container)
        await until(lambda: _reaches(machine, container))
        refused = await machine.ctl("firewall", "down")
        after = await machine.python(container, KNOCK)
        await remove(machine, container)

    assert before.out.startswith("refused") and after.out.startswith("refused")
    assert during.out.startswith("reached") and still.out.startswith("reached")
    assert refused.code != 0 and "bypassed" in refused.err


@pytest.mark.parametrize(
    ("setting", "outside", "inside"), [("published", "data", "data"), ("none", "refused", "refused")]
)
async def test_who_may_come_in_follows_the_setting(
    machine: DockerMachine, setting: str, outside: str, inside: str
) -> None:
    """`firewall.inbound`: published lets the world in at published ports and nowhere else, none not even the host."""
    machine.machine.environment["CLAWKER_CP_FIREWALL__INBOUND"] = setting
    async with serving(machine.machine):
        container = await start(
            machine, f"in-{setting}", "/usr/bin/python3", "-c", SERVE,
            host_config={"NetworkMode": NETWORK, "PortBindings": {"8001/tcp": [{"HostIp": "", "HostPort": "18001"}]}},
            ExposedPorts={"8001/tcp": {}},
        )  # fmt: skip
        address = (await session(machine, container))["address"]

        async def pull(where: int, target: str, port: int) -> str:
            argv = ("nsenter", "-t", str(where), "-n", "/usr/bin/python3", "-c", PULL, target, str(port))
            process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
            out, _ = await process.communicate()
            return out.decode().strip()

        async def listens() -> bool:
            code = PULL.replace("sys.argv[1]", "'127.0.0.1'").replace("sys.argv[2]", "'8001'")
            return (await machine.python(container, code)).out.strip() == "data"

        await until(listens)
        world, host = machine.machine.world.pid, machine.machine.host.pid
        answers = [await pull(world, "192.0.2.1", 18001), await pull(host, address, 8001)]
        other = await pull(host, address, 8002)
        await remove(machine, container)

    assert answers == [outside, inside]
    assert other == "refused"


async def test_a_frozen_engine_opens_nothing_and_closes_what_is_told(machine: DockerMachine) -> None:
    """While the engine's threads stand still agents stay judged and a quarantine holds; afterwards all is followed."""
    machine.machine.environment["CLAWKER_CP_FIREWALL__INBOUND"] = "host"
    async with serving(machine.machine):
        allowed = await machine.ctl("allow", "http://api.example.com")
        assert allowed.code == 0, allowed.err
        container = await start(machine, "frozen")
        await until(lambda: _reaches(machine, container))
        pid = (await machine.docker.client.inspect(container))["State"]["Pid"]
        enter = f'echo $$ > {machine.docker.cgroup / container}/cgroup.procs && exec nsenter -t {pid} -n -- "$@"'
        connect = f"import socket; socket.create_connection(({API!r}, 80), 2)"
        await machine.machine.world.reset()
        machine.docker.freeze_daemon(on=True)
        try:
            knocked = await machine.machine.host.run(["sh", "-c", enter, "enter", "/usr/bin/python3", "-c", KNOCK])
            before = await machine.machine.host.run(["sh", "-c", enter, "enter", "/usr/bin/python3", "-c", connect])
            done = await machine.ctl("quarantine", "p/frozen", "--reason", "test", timeout_s=60)
            after = await machine.machine.host.run(["sh", "-c", enter, "enter", "/usr/bin/python3", "-c", connect])
        finally:
            machine.docker.freeze_daemon(on=False)
        late = await start(machine, "late")
        isolated = (await machine.inside(container, *CURL)).out
        packets = await machine.machine.world.packets(dst=EVIL)
        await remove(machine, container, late)

    assert knocked.out.startswith("refused") and packets == []
    assert done.code == 0, done.err
    assert (before.code, after.code) == (0, 1) and isolated in {"", "000"}
