"""
Who carries the traffic (architecture 3.2): Envoy and CoreDNS as processes of ours, or as containers beside us.

`auto` is the former: both are the real programs either way. Containers are for those who keep their proxy in an
image; they need the Docker engine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from clawker_cp.config import Directories, Settings
from clawker_cp.dns.coredns import CHILD_ADDRESS, CHILD_PORT, CoreDnsPlace, corefile
from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.network import fixed_address
from clawker_cp.engines.docker.siblings import COREDNS, ENVOY, Bind, Sibling
from clawker_cp.engines.docker.stack import SiblingProcess, remove_sibling
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.envoy.files import replace_file
from clawker_cp.firewall.envoy.options import EnvoyOptions, find_binary, find_roots
from clawker_cp.firewall.envoy.stack import LastingProcessLike, envoy_command
from clawker_cp.processes.coredns import CoreDnsChild
from clawker_cp.processes.lasting import LastingProcess, end_left
from clawker_cp.wiring.coredns import coredns_child
from clawker_cp.wiring.coredns_container import CoreDnsContainer
from clawker_cp.wiring.docker_host import DockerHost
from clawker_cp.wiring.placement import LOOPBACK, Placement

log = structlog.get_logger()

HOST_DIRECTORIES = tuple(f"CLAWKER_HOST_{kind}_DIR" for kind in ("CONFIG", "DATA", "STATE", "CACHE"))
ENVOY_HEALTH, COREDNS_HEALTH = 18901, 18902  # on the host's loopback (D1)
DNS_PORT, METRICS_PORT = 53, 9153
HOSTS, ROOTS, PID_FILE = "hosts", "roots.pem", "envoy.pid"


@dataclass(frozen=True, slots=True)
class Stack:
    """
    What carries the traffic. `front` is whom the gate asks before the forwarders, "" = nobody; `view` is where it
    answers the proxy. `roots` is what origins are judged by, as found on this machine.
    """

    name: str
    options: EnvoyOptions
    roots: Path
    process: LastingProcessLike
    coredns: CoreDnsChild | CoreDnsContainer | None
    front: str
    view: str
    end_other: Callable[[], Awaitable[None]]

    async def prepare(self) -> None:
        """
        End what another kind of stack left running, and write what the proxy's container reads beside its own files.
        """
        await self.end_other()
        if self.name == "container":
            await asyncio.to_thread(self._write_files)

    def _write_files(self) -> None:
        # The system's roots, and an empty hosts file: the resolver library answers from that before it asks anybody.
        directory = self.options.directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        replace_file(self.options.roots, self.roots.read_bytes(), 0o644)
        # Not replaced: the container has this very file.
        (directory / HOSTS).write_bytes(b"")
        (directory / HOSTS).chmod(0o644)


def chosen_stack(
    settings: Settings,
    directories: Directories,
    engine: HostEngine | DockerHost,
    where: Placement,
    environ: Mapping[str, str],
    *,
    admit: Callable[[str], Awaitable[None]],
) -> Stack:
    """
    The stack that the settings ask for, not started. `admit` lets a container's frames pass the ring.

    Raises `InvalidInput` where it cannot be had: no Docker engine, or host paths that are not known (D4).
    """
    roots = find_roots(settings.envoy.trusted_ca)
    if settings.stack == "container":
        if not isinstance(engine, DockerHost):
            raise InvalidInput(
                "stack: containers are run by the Docker engine, and the engine is the host's",
                hint="set stack to embedded, or engine to docker",
            )
        return _containers(settings, directories, engine, roots, host_directories(directories, where, environ), admit)
    options = _options(settings, directories, engine.network, roots, LOOPBACK)
    command = envoy_command(find_binary(settings.envoy.binary), options)
    return Stack(
        name="embedded",
        options=options,
        roots=roots,
        process=LastingProcess("envoy", command, directories.firewall / PID_FILE, options.log),
        coredns=coredns_child(settings, directories),
        front=f"{CHILD_ADDRESS}:{CHILD_PORT}" if settings.dns.coredns else "",
        view=LOOPBACK,
        end_other=partial(_end_containers, engine),
    )


def host_directories(directories: Directories, where: Placement, environ: Mapping[str, str]) -> Directories:
    """
    Our directories as the engine's host knows them: our own, unless we are a container (D4).
    """
    if not where.in_container:
        return directories
    missing = [name for name in HOST_DIRECTORIES if not environ.get(name, "").startswith("/")]
    if missing:
        raise InvalidInput(
            f"stack: container needs {', '.join(missing)}: where the host has what is mounted here",
            hint="start the control plane with clawkerctl up, which sets them",
        )
    config, data, state, cache = (Path(environ[name]) for name in HOST_DIRECTORIES)
    return Directories(config=config, data=data, state=state, cache=cache)


def _containers(
    settings: Settings,
    directories: Directories,
    engine: DockerHost,
    roots: Path,
    host: Directories,
    admit: Callable[[str], Awaitable[None]],
) -> Stack:
    _refuse_loopback(settings)
    network, user = engine.network, f"{os.geteuid()}:{os.getegid()}"
    options = _options(settings, directories, network, directories.firewall / "envoy" / ROOTS, network.cp)
    on_host = host.firewall / "envoy"
    proxy = Sibling(
        name=ENVOY,
        image=settings.envoy.image,
        address=network.proxy,
        command=(*envoy_command("envoy", options, hide_hosts=False), "--log-path", str(options.log)),
        binds=(
            Bind(on_host, options.directory, read_only=False),
            Bind(on_host / HOSTS, Path("/etc/hosts")),
        ),
        published={options.health_port: ENVOY_HEALTH},
        user=user,
    )
    place = CoreDnsPlace(fixed_address(network, settings.network.octets.dns), DNS_PORT, COREDNS_HEALTH, METRICS_PORT)
    config = directories.firewall / "coredns"
    resolver = Sibling(
        name=COREDNS,
        image=settings.dns.coredns_image,
        address=place.address,
        command=("/coredns", "-conf", str(config / "Corefile")),
        binds=(Bind(host.firewall / "coredns", config),),
        published={COREDNS_HEALTH: COREDNS_HEALTH},
        user=user,
        capabilities=("NET_BIND_SERVICE",),
    )
    return Stack(
        name="container",
        options=options,
        roots=roots,
        process=SiblingProcess(engine.client, network, proxy, admit=admit, log_path=options.log),
        coredns=CoreDnsContainer(
            SiblingProcess(engine.client, network, resolver, admit=admit),
            config / "Corefile",
            corefile(settings.dns.forwarders, settings.dns.zones, place),
            f"http://{place.address}:{place.health_port}/health",
        ),
        front=f"{place.address}:{place.port}",
        view=network.cp,
        end_other=partial(_end_process, directories.firewall / PID_FILE),
    )


def _refuse_loopback(settings: Settings) -> None:
    keys = {"dns.forwarders": settings.dns.forwarders}
    keys |= {f"dns.zones.{zone}": servers for zone, servers in settings.dns.zones.items()}
    for key, servers in keys.items():
        for server in servers:
            address = ipaddress.ip_address(server)
            address = getattr(address, "ipv4_mapped", None) or address
            if address.is_loopback or address.is_unspecified:
                raise InvalidInput(
                    f"{key}: {server} is {COREDNS} itself where stack is container",
                    hint="name a server that the container reaches, or set stack to embedded",
                )


async def _end_process(mark: Path) -> None:
    if await asyncio.to_thread(end_left, mark):
        log.info("stack_changed", ended="the proxy that ran as a process")


async def _end_containers(engine: HostEngine | DockerHost) -> None:
    if isinstance(engine, DockerHost):
        for name in (ENVOY, COREDNS):
            if await remove_sibling(engine.client, name):
                log.info("stack_changed", ended=name)


def _options(
    settings: Settings, directories: Directories, network: AgentNetwork, roots: Path, view: str
) -> EnvoyOptions:
    return EnvoyOptions(
        directory=directories.firewall / "envoy",
        proxy_addr=network.proxy,
        roots=roots,
        resolver=(view, settings.dns.proxy_view_port),
        concurrency=settings.envoy.concurrency,
        http3=settings.envoy.http3,
    )
