"""
Which engine runs the agents (architecture 3.1), and the server's side of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from clawker_cp.agents.database import Database
from clawker_cp.agents.quarantines import Quarantines
from clawker_cp.agents.roster import Roster
from clawker_cp.config import Directories, Settings
from clawker_cp.ebpf import Manager
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.firewall.reconcile import Reconciler
from clawker_cp.wiring.agent_side import AgentSide
from clawker_cp.wiring.enforcement import Enforcement
from clawker_cp.wiring.firewall_control import FirewallControl
from clawker_cp.wiring.host_agents import HostAgents
from clawker_cp.wiring.reports import Reports

Engine = HostEngine


@asynccontextmanager
async def chosen_engine(
    settings: Settings, directories: Directories, *, only_host: bool = False
) -> AsyncIterator[Engine]:
    """
    The engine that the settings ask for, while the block runs.
    """
    yield HostEngine(
        state_dir=directories.state,
        bridge=settings.host.bridge,
        subnet=settings.host.subnet,
        cgroup_parent=settings.host.cgroup_parent,
        masked=(directories.config, directories.data, directories.state, directories.cache),
        ca_dir=directories.data / "ca-bundle",
        with_ring=settings.firewall.host_ring,
    )


def make_side(
    engine: Engine,
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
    *,
    idle: Callable[[], None],
) -> AgentSide:
    """
    The server's side of an engine.
    """
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
