"""The ring beside a real engine's own rules: forwarding, masquerading, published ports, its restart (contract 1.3)."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.ports import Port, find_port
from clawker_cp.engines.docker.ring import DockerRing
from clawker_cp.engines.docker.ring_rules import Pin
from clawker_cp.engines.host.direct import Direct
from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.testing.bridge_world import FAR, GATEWAY, HOST, ON_HOST, SUBNET, WORLD, connected, hold, run
from clawker_cp.testing.docker_world import IMAGE, DockerWorld, missing
from clawker_cp.testing.sandbox_world import tcp_server, until
from clawker_cp.testing.world import HostNamespace

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.docker,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]
REFUSED = {"TimeoutError", "ConnectionRefusedError", "ConnectionResetError", "OSError", ""}


async def test_ring_holds_beside_docker_and_published_ports_follow_the_setting() -> None:
    """
    Direct paths pass the engine's forwarding, nothing else does; who reaches a published port follows
    firewall.inbound; a restart of the engine changes none of it.
    """
    with contextlib.ExitStack() as stack:
        async with HostNamespace() as host:
            outside = hold("unshare", "--net")
            stack.callback(end, outside)
            world = Path(f"/proc/{outside.pid}/ns/net")
            for command in (
                f"link add up0 type veth peer name up0 netns {outside.pid}", f"addr add {HOST}/24 dev up0",
                "link set up0 up", f"route add 203.0.113.0/24 via {WORLD}",
            ):  # fmt: skip
                run("nsenter", "-t", str(host.pid), "-n", "ip", *command.split())
            for command in (
                f"addr add {WORLD}/24 dev up0", "link set up0 up", "link set lo up", f"addr add {FAR}/32 dev lo",
                f"route add {SUBNET} via {HOST}",
            ):  # fmt: skip
                run("nsenter", "-t", str(outside.pid), "-n", "ip", *command.split())
            async with DockerWorld(host, live_restore=True) as engine:
                docker = functools.partial(said, "docker", "--host", engine.endpoint)
                identity = docker("network", "create", "--subnet", SUBNET, "--gateway", GATEWAY, "clawker-net")
                bridge = f"br-{identity[:12]}"
                network = AgentNetwork(id=identity, subnet=SUBNET, gateway=GATEWAY, bridge=bridge, **ON_HOST)
                ring = DockerRing(network, host_pid=host.pid)
                await ring.install([])

                pid, other = (
                    started(docker, *words, "--network", "clawker-net", "--ip", address)
                    for words, address in (
                        (("--name", "agent", "-p", "8080:80"), "10.231.96.5"), (("--name", "other"), "10.231.96.6")
                    )
                )  # fmt: skip
                inside, sibling = Path(f"/proc/{pid}/ns/net"), Path(f"/proc/{other}/ns/net")
                for where, listener in ((inside, 80), (inside, 7700), (sibling, 80)):
                    stack.enter_context(tcp_server("0.0.0.0", listener, where))
                stack.enter_context(tcp_server("0.0.0.0", 443, world))
                stack.enter_context(tcp_server(GATEWAY, 10000, host.netns))

                def from_agent(address: str, port: int) -> str:
                    return in_netns(inside, lambda: connected(address, port))

                def published() -> tuple[bool, ...]:
                    """From outside, from the host by its address, from the host by loopback: answered?"""
                    asked = ((world, HOST), (host.netns, HOST), (host.netns, "127.0.0.1"))
                    answers = [in_netns(where, partial(connected, to, 8080)) for where, to in asked]
                    return tuple(answer not in REFUSED for answer in answers)

                # Before enrolment: no way, whatever the engine allows.
                assert {from_agent(WORLD, 443), from_agent(GATEWAY, 10000), from_agent("10.231.96.6", 80)} <= REFUSED
                port, second = [await find_port(each, bridge, host_pid=host.pid) for each in (pid, other)]
                assert port.mac == docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.MacAddress}}{{end}}",
                                          "agent")  # fmt: skip
                pins = [_pin(port, "10.231.96.5"), _pin(second, "10.231.96.6")]
                for pin in pins:
                    await ring.pin(pin.interface, pin.address, mac=pin.mac)
                own = [(6, 10000)]
                await ring.admit("10.231.96.5", [], own)

                for restarted in (False, True):
                    if restarted:
                        await engine.stop_daemon()
                        await engine.start_daemon()
                        assert "DOCKER" in run("nsenter", "-t", str(host.pid), "-n", "iptables", "-S", "FORWARD")
                    # Who asked before its port was open asks for the neighbour again within a second.
                    until(lambda: from_agent(GATEWAY, 10000) == "10.231.96.5", "the way to the gateway")
                    assert {from_agent(WORLD, 443), from_agent("10.231.96.6", 80)} <= REFUSED
                    await ring.admit("10.231.96.5", [Direct(f"{WORLD}/32", 6, 443, 443)], own)
                    assert from_agent(WORLD, 443) == HOST
                    assert from_agent(FAR, 443) in REFUSED
                    await ring.admit("10.231.96.5", [], own)
                    await ring.admit_all("10.231.96.5", 60)
                    assert from_agent(FAR, 443) == HOST
                    assert from_agent("10.231.96.6", 80) in REFUSED
                    await ring.end_all("10.231.96.5")
                    assert from_agent(FAR, 443) in REFUSED
                    assert published() == (False, True, True)

                assert in_netns(world, lambda: connected("10.231.96.5", 80)) in REFUSED
                await DockerRing(network, host_pid=host.pid, inbound="published").install(pins)
                assert published() == (True, True, True)
                assert in_netns(world, lambda: connected("10.231.96.5", 7700)) in REFUSED
                assert from_agent(WORLD, 443) in REFUSED
                await DockerRing(network, host_pid=host.pid, inbound="none").install(pins)
                assert published() == (False, False, False)
                assert in_netns(host.netns, lambda: connected("10.231.96.5", 7700)) == GATEWAY


def said(*command: str) -> str:
    return run(*command).strip()


def started(docker: Callable[..., str], *options: str) -> int:
    """A sleeping container's first process."""
    return int(docker("inspect", "-f", "{{.State.Pid}}", docker("run", "-d", *options, IMAGE, "sleep", "600")))


def _pin(port: Port, address: str) -> Pin:
    return Pin(port.interface, address, port.mac)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
