"""
Which engine runs the agents (architecture 3.1), and the server's side of it.

`auto` takes the Docker daemon when one answers; a control plane that is a container has no other choice, and a
server that `run` starts for itself has none either: it is the host's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from clawker_cp.agents.container_lives import ContainerLives
from clawker_cp.agents.database import Database
from clawker_cp.agents.quarantines import Quarantines
from clawker_cp.agents.registry import Registry
from clawker_cp.agents.roster import Roster
from clawker_cp.config import Directories, Settings, environment
from clawker_cp.ebpf import Manager
from clawker_cp.engines.base import AgentNetwork, RingEvent
from clawker_cp.engines.docker.ports import find_port
from clawker_cp.engines.docker_client import endpoint_from, socket_path
from clawker_cp.engines.dockerevents import DockerEventFeeder
from clawker_cp.engines.host.bubble import OPEN_FILES
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.engines.host.sockets import SocketInfo
from clawker_cp.errors import ClawkerError, InvalidInput
from clawker_cp.firewall.reconcile import Reconciler
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.wiring.agent_side import AgentSide
from clawker_cp.wiring.container_enforcement import ContainerEnforcement
from clawker_cp.wiring.docker_agents import DockerAgents
from clawker_cp.wiring.docker_host import DockerHost, docker_host
from clawker_cp.wiring.enforcement import Enforcement
from clawker_cp.wiring.firewall_control import FirewallControl
from clawker_cp.wiring.host_agents import HostAgents
from clawker_cp.wiring.placement import Placement
from clawker_cp.wiring.reports import Reports

log = structlog.get_logger()


class Engine(Protocol):
    """What the composition root asks of an engine before it has agents: addresses, cgroup, ring."""

    @property
    def network(self) -> AgentNetwork: ...
    @property
    def parent_cgroup(self) -> Path | None: ...
    @property
    def session_port(self) -> int: ...
    def inbound(self, setting: str) -> str: ...
    async def answers(self) -> str: ...
    def report_drops(self, on_drop: Callable[[RingEvent], None]) -> None: ...
    def exit_code(self, agent_id: str, /) -> int | None: ...
    async def cut(self, agent_id: str, match: Callable[[SocketInfo], bool], /) -> int: ...
    async def host_addresses(self) -> list[str]: ...


@asynccontextmanager
async def chosen_engine(
    settings: Settings,
    directories: Directories,
    where: Placement,
    *,
    only_host: bool = False,
    open_files: int = OPEN_FILES,
) -> AsyncIterator[HostEngine | DockerHost]:
    """
    The engine that the settings ask for and the place allows, while the block runs.

    `open_files` is the limit that programs in sandboxes begin with.
    """
    if where.in_container and settings.engine == "host":
        raise InvalidInput("engine: a control plane that is a container has no sandboxes", hint="set it to docker")
    asked = settings.engine == "docker" or where.in_container
    async with AsyncExitStack() as stack:
        if not only_host and (asked or (settings.engine == "auto" and _daemon_is_there())):
            try:
                host = await stack.enter_async_context(
                    docker_host(
                        settings,
                        directories,
                        environment(),
                        own_container_id=where.container_id or None,
                        host_netns=where.host_netns,
                    )
                )
            except ClawkerError as error:
                if asked:
                    raise
                log.warning("engine_docker_unavailable", cause=error.message, effect="sandboxes of this host only")
            else:
                yield host
                return
        yield _host_engine(settings, directories, open_files)


def _host_engine(settings: Settings, directories: Directories, open_files: int) -> HostEngine:
    return HostEngine(
        state_dir=directories.state,
        bridge=settings.host.bridge,
        subnet=settings.host.subnet,
        cgroup_parent=settings.host.cgroup_parent,
        masked=(directories.config, directories.data, directories.state, directories.cache),
        ca_dir=directories.data / "ca-bundle",
        with_ring=settings.firewall.host_ring,
        open_files=open_files,
    )


def make_side(
    engine: HostEngine | DockerHost,
    settings: Settings,
    directories: Directories,
    policy: Reconciler,
    manager: Manager,
    enforcement: Enforcement,
    roster: Roster,
    reports: Reports,
    database: Database,
    quarantines: Quarantines,
    firewall: FirewallControl,
    overseer: Overseer,
    *,
    idle: Callable[[], None],
) -> AgentSide:
    """
    The server's side of an engine.
    """
    if isinstance(engine, HostEngine):
        return HostAgents(
            engine,
            settings,
            directories,
            policy,
            manager,
            enforcement,
            roster,
            reports,
            database,
            quarantines,
            require_up=firewall.require_up,
            idle=idle,
        )
    containers = ContainerEnforcement(
        manager,
        enforcement,
        engine.ring,
        partial(find_port, bridge=engine.network.bridge, host_pid=engine.host_pid),
    )
    lives = ContainerLives(
        engine.engine,
        policy,
        containers,
        roster,
        quarantines,
        up=lambda: firewall.up,
        bypass_until_ns=partial(_deadline, manager),
        quarantine_exposed=settings.firewall.on_exposure == "quarantine",
        settle=reports.settle,
    )
    return DockerAgents(
        engine,
        DockerEventFeeder(engine.client, overseer.publish),
        overseer,
        lives,
        containers,
        manager,
        roster,
        Registry(database),
        pin_dir=Path(settings.firewall.pin_dir),
    )


def _deadline(manager: Manager, cgroup_id: int) -> int:
    """Until when the kernel lets an agent pass, as an earlier server left it; 0 for none."""
    row = manager.agents().get(cgroup_id)
    return row.bypass_until_ns if row is not None else 0


def _daemon_is_there() -> bool:
    return Path(socket_path(endpoint_from(environment()))).exists()
