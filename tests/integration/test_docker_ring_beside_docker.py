"""The ring beside a real engine's own rules: forwarding, masquerading, published ports, its restart (contract 1.3)."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.ports import Port, find_port
from clawker_cp.engines.docker.ring import DockerRing
from clawker_cp.engines.docker.ring_rules import Pin
from clawker_cp.engines.host.direct import Direct
from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.testing.bridge_world import FAR, GATEWAY, HOST, ON_HOST, SUBNET, WORLD, connected, hold, run
from clawker_cp.testing.sandbox_world import tcp_server, until
from clawker_cp.testing.world import HostNamespace

BUSYBOX = shutil.which("busybox")
pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("dockerd") is None, reason="needs dockerd"),
    pytest.mark.skipif(BUSYBOX is None, reason="needs a static busybox"),
]
REFUSED = {"TimeoutError", "ConnectionRefusedError", "ConnectionResetError", "OSError", ""}


@dataclass
class Docker:
    """An engine of the test's own in a host namespace; a daemon that is started again keeps its containers."""

    host: HostNamespace
    base: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        return f"unix://{self.base}/docker.sock"

    def start(self) -> None:
        log = (self.base / "log").open("ab")
        self.process = self.host.popen(
            ["dockerd", "--live-restore", "-H", self.socket, "--data-root", f"{self.base}/data",
             "--exec-root", f"{self.base}/exec", "--pidfile", f"{self.base}/pid", "--storage-driver", "vfs",
             "--cgroup-parent", f"/{self.host.prefix}-docker"],
            stdout=log, stderr=log,
        )  # fmt: skip
        log.close()
        until(self.answers, "the engine")

    def answers(self) -> bool:
        return (
            subprocess.run(["docker", "-H", self.socket, "version"], capture_output=True, check=False).returncode == 0
        )

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)

    def __call__(self, *words: str) -> str:
        return run("docker", "-H", self.socket, *words).strip()

    def image(self) -> None:
        assert BUSYBOX is not None
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(BUSYBOX, "bin/busybox")
        subprocess.run(
            ["docker", "-H", self.socket, "import", "-", "box"],
            input=packed.getvalue(),
            check=True,
            capture_output=True,
        )

    def run(self, name: str, *options: str) -> int:
        self("run", "-d", "--name", name, *options, "box", "/bin/busybox", "sleep", "600")
        return int(self("inspect", "-f", "{{.State.Pid}}", name))


@contextlib.contextmanager
def engine(host: HostNamespace, base: Path) -> Iterator[Docker]:
    made = Docker(host, base)
    try:
        made.start()
        made.image()
        yield made
    finally:
        # A daemon that keeps its containers over a restart leaves them to whoever stops it for good.
        if made.answers() and (names := made("ps", "-aq").split()):
            made("rm", "-f", *names)
        made.stop()
        places = [place for place in Path("/sys/fs/cgroup").glob(f"**/{host.prefix}-docker") if place.is_dir()]
        for place in places:
            until(functools.partial(removed, place), f"the end of {place}")


def removed(place: Path) -> bool:
    try:
        for directory in (*sorted(place.rglob("*/"), reverse=True), place):
            directory.rmdir()
    except FileNotFoundError:
        return True  # another controller's name of the same directory
    except OSError:
        return False
    return True


async def test_ring_holds_beside_docker_and_published_ports_follow_the_setting(tmp_path: Path) -> None:
    """
    Direct paths pass the engine's forwarding, nothing else does; who reaches a published port follows
    firewall.inbound; a restart of the engine changes none of it.
    """
    tmp_path.chmod(0o755)
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
            with engine(host, tmp_path) as docker:
                identity = docker("network", "create", "--subnet", SUBNET, "--gateway", GATEWAY, "clawker-net")
                bridge = f"br-{identity[:12]}"
                network = AgentNetwork(id=identity, subnet=SUBNET, gateway=GATEWAY, bridge=bridge, **ON_HOST)
                ring = DockerRing(network, host_pid=host.pid)
                await ring.install([])

                pid = docker.run("agent", "--network", "clawker-net", "--ip", "10.231.96.5", "-p", "8080:80")
                other = docker.run("other", "--network", "clawker-net", "--ip", "10.231.96.6")
                inside, sibling = Path(f"/proc/{pid}/ns/net"), Path(f"/proc/{other}/ns/net")
                for where, port in ((inside, 80), (inside, 7700), (sibling, 80)):
                    stack.enter_context(tcp_server("0.0.0.0", port, where))
                stack.enter_context(tcp_server("0.0.0.0", 443, world))
                stack.enter_context(tcp_server(GATEWAY, 10000, host.netns))

                def from_agent(address: str, port: int) -> str:
                    return in_netns(inside, lambda: connected(address, port))

                def published() -> tuple[bool, bool, bool]:
                    """From outside, from the host by its address, from the host by loopback: answered?"""
                    asked = ((world, HOST), (host.netns, HOST), (host.netns, "127.0.0.1"))
                    answers = [in_netns(where, lambda to=to: connected(to, 8080)) for where, to in asked]
                    return tuple(answer not in REFUSED for answer in answers)  # type: ignore[return-value]

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
                        docker.stop()
                        docker.start()
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


def _pin(port: Port, address: str) -> Pin:
    return Pin(port.interface, address, port.mac)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
