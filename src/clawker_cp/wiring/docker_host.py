"""
One Docker daemon as the composition root has it: client, network, engine, ring, and where we are beside it.

Opened before anything is built, because every address comes from the daemon's network.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from clawker_cp.config import Directories, Settings
from clawker_cp.engines.base import AgentNetwork, RingEvent
from clawker_cp.engines.docker.engine import DockerEngine
from clawker_cp.engines.docker.network import ensure_network
from clawker_cp.engines.docker.own_share import OwnShare
from clawker_cp.engines.docker.ring import DockerRing
from clawker_cp.engines.docker_client import DockerClient, endpoint_from
from clawker_cp.engines.host import cgroups
from clawker_cp.engines.host.sockets import SocketInfo
from clawker_cp.errors import ClawkerError

log = structlog.get_logger()

AGENT_DAEMON_PORT = 7700
HOST_NAME = "host.docker.internal"
RESOLVE_LIMIT_S = 2.0
HOST_PID = 1  # the host's first process, seen from a container with pid: host


class DockerHost:
    """
    Fulfils `engine_choice.Engine` with containers. `host_pid` is a process of the host's namespaces; `driver` is the
    daemon's cgroup driver and `default_parent` where it puts containers, if it was told. `share` is what one agent may
    take of us, where we are a container.
    """

    name = "docker"
    session_port = AGENT_DAEMON_PORT

    def __init__(
        self,
        client: DockerClient,
        engine: DockerEngine,
        ring: DockerRing | None,
        *,
        share: OwnShare | None = None,
        host_pid: int,
        parent: str,
        driver: str,
        default_parent: str = "",
    ) -> None:
        self.client = client
        self.engine = engine
        self.ring = ring
        self.share = share
        self.host_pid = host_pid
        self.driver = driver
        self._parent = parent
        self._default_parent = default_parent.strip("/")
        self.on_drop: Callable[[RingEvent], None] | None = None

    @property
    def network(self) -> AgentNetwork:
        return self.engine.network

    @property
    def parent_cgroup(self) -> Path | None:
        """
        The agents' parent, made if we may; None where the cgroup file system is read-only and it is not there.
        """
        path = cgroups.find_cgroup2() / self._parent
        try:
            cgroups.ensure(path)
        except (ClawkerError, OSError) as error:
            if not path.is_dir():
                log.info("agents_parent_missing", path=str(path), cause=str(error))
                return None
        return path

    def remove_parent(self) -> None:
        """
        Take the agents' parent away when nothing is in it; another's, or a read-only one, stays.
        """
        path = cgroups.find_cgroup2() / self._parent
        try:
            cgroups.remove(path)
        except OSError as error:
            log.info("agents_parent_kept", path=str(path), cause=error.strerror)

    def cgroup_parents(self) -> tuple[Path, ...]:
        """
        Directories in which cgroups of containers appear; those that the agents' parent has need no links.
        """
        names = (self._default_parent, "system.slice" if self.driver == "systemd" else "docker")
        return tuple(cgroups.find_cgroup2() / name for name in dict.fromkeys(names) if name)

    def inbound(self, setting: str) -> str:
        """
        Who may come in where `firewall.inbound` says so.
        """
        return setting

    async def answers(self) -> str:
        """
        What is wrong with the daemon, "" if nothing is.
        """
        try:
            await self.client.ping()
        except ClawkerError as error:
            return error.message
        return ""

    def report_drops(self, on_drop: Callable[[RingEvent], None]) -> None:
        """
        Say who is told of packets that the ring drops.
        """
        self.on_drop = on_drop

    def exit_code(self, _container_id: str) -> int | None:
        """Nobody waits for a container here."""
        return None

    async def cut(self, agent_id: str, match: Callable[[SocketInfo], bool], /) -> int:
        return await self.engine.cut(agent_id, match)

    async def host_addresses(self) -> list[str]:
        return await self.engine.host_addresses()

    async def existing(self) -> set[str]:
        """
        Ids of all containers, stopped ones too.
        """
        return {str(entry["Id"]) for entry in await self.client.list_containers(every=True)}

    async def on_network(self) -> list[str]:
        """
        Ids of containers that are on the agents' network now.
        """
        record: Mapping[str, Any] = await self.client.inspect_network(self.network.id)
        return list(record.get("Containers") or {})

    async def address_of(self, name: str) -> str | None:
        """
        The address of a running container of that name on the agents' network.
        """
        record: Mapping[str, Any] = await self.client.inspect_network(self.network.id)
        for entry in (record.get("Containers") or {}).values():
            if entry.get("Name") == name and entry.get("IPv4Address"):
                return str(entry["IPv4Address"]).partition("/")[0]
        return None


@asynccontextmanager
async def docker_host(
    settings: Settings,
    directories: Directories,
    environ: Mapping[str, str],
    *,
    own_container_id: str | None = None,
    host_netns: Path | None = None,
) -> AsyncIterator[DockerHost]:
    """
    The daemon that DOCKER_HOST or the default socket leads to, while the block runs.

    Raises `Unavailable` for one that does not answer, `Conflict` for a network that cannot serve agents.
    """
    client = DockerClient(endpoint_from(environ))
    try:
        info = await client.info()
        network = await ensure_network(
            client,
            settings.network,
            own_container_id=own_container_id,
            stack="container" if settings.stack == "container" else "embedded",
        )
        if settings.host_proxy.enabled:
            address = await host_proxy_address(network, in_container=own_container_id is not None)
            network = replace(network, host_proxy=address)
        host_pid = HOST_PID if host_netns is not None else os.getpid()
        proxy = ((network.host_proxy, settings.host_proxy.port),) if network.host_proxy else ()
        ring = (
            DockerRing(network, inbound=settings.firewall.inbound, extra_tuples=proxy, host_pid=host_pid)
            if settings.firewall.host_ring
            else None
        )
        engine = DockerEngine(
            client,
            network,
            ring=ring,
            own=(directories.config, directories.data, directories.state, directories.cache),
            host_netns=host_netns,
        )
        yield DockerHost(
            client,
            engine,
            ring,
            share=OwnShare(network) if own_container_id is not None else None,
            host_pid=host_pid,
            parent=settings.host.cgroup_parent,
            driver=str(info.get("CgroupDriver") or ""),
        )
    finally:
        await client.aclose()


async def host_proxy_address(network: AgentNetwork, *, in_container: bool) -> str:
    """
    Where the host proxy answers: `host.docker.internal` as a container resolves it, else the network's gateway.
    """
    if not in_container:
        return network.gateway
    try:
        async with asyncio.timeout(RESOLVE_LIMIT_S):
            found = await asyncio.get_running_loop().getaddrinfo(HOST_NAME, None, family=socket.AF_INET)
    except (OSError, TimeoutError):
        return network.gateway
    return str(found[0][4][0])
