"""Who carries the traffic, by settings, engine and place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from clawker_cp.config import Directories, DnsSettings, NetworkSettings, Octets, Settings
from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.engine import DockerEngine
from clawker_cp.engines.docker.stack import SiblingProcess
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.errors import Conflict, InvalidInput
from clawker_cp.processes.coredns import CoreDnsChild
from clawker_cp.processes.lasting import LastingProcess
from clawker_cp.wiring.coredns_container import CoreDnsContainer
from clawker_cp.wiring.docker_host import DockerHost
from clawker_cp.wiring.placement import Placement
from clawker_cp.wiring.stack_choice import HOST_DIRECTORIES, Stack, chosen_stack, host_directories

NETWORK = AgentNetwork("n", "10.231.96.0/20", "10.231.96.1", "br-x", "10.231.96.200", "10.231.96.202", "10.231.96.202")
IN_CONTAINER = Placement("c" * 64)


async def _admit(_container: str) -> None:
    return


def _directories(path: Path) -> Directories:
    return Directories(config=path / "c", data=path / "d", state=path / "s", cache=path / "k")


def _docker(path: Path) -> DockerHost:
    client = DockerClient(f"unix://{path}/none.sock")
    engine = DockerEngine(client, NETWORK)
    return DockerHost(client, engine, None, host_pid=1, parent="x.slice", driver="cgroupfs")


def _choose(tmp_path: Path, settings: Settings, where: Placement = Placement(), **environ: str) -> Stack:
    roots = tmp_path / "roots.pem"
    roots.write_text("-----BEGIN CERTIFICATE-----\n")
    settings = msgspec.structs.replace(settings, envoy=msgspec.structs.replace(settings.envoy, trusted_ca=str(roots)))
    return chosen_stack(settings, _directories(tmp_path), _docker(tmp_path), where, environ, admit=_admit)


def _body(process: Any) -> Any:
    return process._sibling


def test_children_unless_containers_are_asked_for(tmp_path: Path) -> None:
    """`auto` and `embedded` are processes of ours; the gate asks the forwarders itself unless CoreDNS is named."""
    plain = _choose(tmp_path, Settings())
    binary = tmp_path / "coredns"
    binary.write_text("")
    binary.chmod(0o755)
    fronted = _choose(tmp_path, Settings(stack="embedded", dns=DnsSettings(coredns=str(binary))))

    assert (plain.name, plain.coredns, plain.front, plain.view) == ("embedded", None, "", "127.0.0.1")
    assert isinstance(plain.process, LastingProcess) and plain.options.resolver == ("127.0.0.1", 9953)
    assert isinstance(fronted.coredns, CoreDnsChild) and fronted.front == "127.0.0.1:9954"


def test_containers_have_addresses_of_their_own_and_the_hosts_paths(tmp_path: Path) -> None:
    """Proxy and CoreDNS at their octets, mounted from where the host has the files, at the paths we have."""
    environ = {name: f"/host/{name.lower()}" for name in HOST_DIRECTORIES}
    stack = _choose(tmp_path, Settings(stack="container"), IN_CONTAINER, **environ)
    assert isinstance(stack.process, SiblingProcess) and isinstance(stack.coredns, CoreDnsContainer)
    envoy, coredns = _body(stack.process), _body(stack.coredns._process)
    directory = tmp_path / "d" / "firewall" / "envoy"

    assert (stack.name, stack.front, stack.view) == ("container", "10.231.96.201:53", "10.231.96.202")
    assert stack.options.resolver == ("10.231.96.202", 9953) and stack.options.roots == directory / "roots.pem"
    assert (envoy.address, coredns.address) == ("10.231.96.200", "10.231.96.201")
    assert envoy.binds[0].source == Path("/host/clawker_host_data_dir/firewall/envoy")
    assert envoy.binds[0].target == directory and not envoy.binds[0].read_only
    assert envoy.binds[1].target == Path("/etc/hosts") and envoy.binds[1].read_only
    assert envoy.command[0] == "envoy" and envoy.command[-2:] == ("--log-path", str(directory / "envoy.log"))
    assert (envoy.published, coredns.published) == ({9902: 18901}, {18902: 18902})
    assert coredns.capabilities == ("NET_BIND_SERVICE",) and coredns.binds[0].read_only


def test_a_container_needs_to_know_the_hosts_paths(tmp_path: Path) -> None:
    """D4: all four variables, as absolute paths, and only in a container."""
    own = _directories(tmp_path)
    some = {HOST_DIRECTORIES[0]: "/c", HOST_DIRECTORIES[1]: "relative", HOST_DIRECTORIES[2]: "/s"}
    with pytest.raises(InvalidInput, match="CLAWKER_HOST_DATA_DIR, CLAWKER_HOST_CACHE_DIR"):
        host_directories(own, IN_CONTAINER, some)
    assert host_directories(own, Placement(), {}) == own


@pytest.mark.parametrize("address", ["127.0.0.53", "::1", "::ffff:127.0.0.1", "0.0.0.0"])
def test_a_containers_loopback_is_nobodys_forwarder(tmp_path: Path, address: str) -> None:
    """The key is named, of the zone as well; a process of ours reaches what listens on this machine."""
    for key, dns in (
        ("dns.forwarders", DnsSettings(forwarders=["198.51.100.53", address])),
        ("dns.zones.corp.example", DnsSettings(zones={"corp.example": [address]})),
    ):
        with pytest.raises(InvalidInput, match=f"^{key}: {address} is clawker-coredns itself") as refused:
            _choose(tmp_path, Settings(stack="container", dns=dns))
        assert "stack to embedded" in (refused.value.hint or "")
        assert _choose(tmp_path, Settings(dns=dns)).coredns is None


def test_each_container_has_an_address_of_the_network(tmp_path: Path) -> None:
    """An octet that the subnet does not have is named, before anything is made."""
    settings = Settings(stack="container", network=NetworkSettings(octets=Octets(dns=1)))
    with pytest.raises(Conflict, match=r"network\.octets: 10\.231\.96\.1 is no free address"):
        _choose(tmp_path, settings)


def test_sandboxes_have_no_containers(tmp_path: Path) -> None:
    """The host's engine cannot run them; that is said before anything starts."""
    engine = object.__new__(HostEngine)
    with pytest.raises(InvalidInput, match="Docker"):
        chosen_stack(Settings(stack="container"), _directories(tmp_path), engine, Placement(), {}, admit=_admit)


async def test_what_a_container_reads_is_written_before_it_starts(tmp_path: Path) -> None:
    """The roots, and a hosts file without any name; a proxy that an earlier stack left as a process is ended."""
    stack = _choose(tmp_path, Settings(stack="container"))
    mark = tmp_path / "d" / "firewall" / "envoy.pid"
    mark.parent.mkdir(parents=True)
    left = LastingProcess("envoy", ["sleep", "60"], mark, tmp_path / "log")
    await left.start("d")
    pid = left.pid
    await stack.prepare()
    await left.wait()

    assert pid and not left.running and not mark.exists()
    assert "CERTIFICATE" in stack.options.roots.read_text()
    assert (stack.options.directory / "hosts").read_bytes() == b""
