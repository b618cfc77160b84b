"""
The composition root: what the server is made of, in the order it starts and drains.

Reads top to bottom. Nothing here decides anything a package could own; adapters between packages
are in `wiring`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from clawker_cp.accel import IMPLEMENTATION
from clawker_cp.agents.database import Database
from clawker_cp.agents.directory import full_name
from clawker_cp.agents.quarantines import Quarantines
from clawker_cp.agents.registration import Registration
from clawker_cp.agents.registry import Registry
from clawker_cp.agents.roster import Roster
from clawker_cp.agents.worldview import Worldview
from clawker_cp.config import Directories, Settings, environment
from clawker_cp.dns.gate import Gate
from clawker_cp.ebpf import Manager
from clawker_cp.engines.base import HostFeature
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.envoy.access_log import AccessLogTail
from clawker_cp.firewall.envoy.stack import EnvoyStack
from clawker_cp.firewall.inspection import InspectionAuthority
from clawker_cp.firewall.reconcile import Reconciler
from clawker_cp.firewall.resolving import PolicyNames
from clawker_cp.firewall.rulebook import RuleBook
from clawker_cp.firewall.store import RuleStore
from clawker_cp.pki.tree import find_tree
from clawker_cp.rpc.admin import FirewallAddresses, new_admin_server
from clawker_cp.rpc.agent import AgentServicer
from clawker_cp.rpc.control import ControlServicer
from clawker_cp.rpc.control_agents import AgentRpcs
from clawker_cp.rpc.control_flows import FlowRpcs
from clawker_cp.rpc.control_rules import RuleRpcs
from clawker_cp.rpc.control_sandboxes import SandboxRpcs
from clawker_cp.runtime.drain import Drain
from clawker_cp.runtime.health import HealthRegistry
from clawker_cp.runtime.overseer import Overseer
from clawker_cp.runtime.runner import on_hangup
from clawker_cp.runtime.startup import CPStartupOrchestrator
from clawker_cp.runtime.tasks import cancelled, leaf_text, supervise, wait_ended
from clawker_cp.telemetry.connections import Connections
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.metrics import Metrics
from clawker_cp.wiring.agent_control import AgentControl
from clawker_cp.wiring.agent_view import AgentView, TokenRevocation
from clawker_cp.wiring.certificate_keeper import CertificateKeeper
from clawker_cp.wiring.control_surface import ControlSurface
from clawker_cp.wiring.coredns import coredns_part, problem_of
from clawker_cp.wiring.docker_host import DockerHost
from clawker_cp.wiring.drain_to_zero import DrainToZero, watcher_options
from clawker_cp.wiring.enforcement import Enforcement
from clawker_cp.wiring.engine_choice import make_side
from clawker_cp.wiring.event_bridge import EventBridge
from clawker_cp.wiring.firewall_control import FirewallControl, KernelWhenUp, gate_answers
from clawker_cp.wiring.health_keeper import HealthKeeper
from clawker_cp.wiring.host_files import make_directories, take_pid_file, write_bundle
from clawker_cp.wiring.placement import Placement
from clawker_cp.wiring.reports import Reports
from clawker_cp.wiring.reserved import learn_addresses
from clawker_cp.wiring.sandbox_service import host_ids
from clawker_cp.wiring.server_status import ServerStatus, implementations
from clawker_cp.wiring.stack_choice import chosen_stack
from clawker_cp.wiring.translation import gate_settings, refuse_host, refuse_what_is_not_offered
from clawker_cp.wiring.world_feed import ContainerNames, tell_agent

log = structlog.get_logger()

DRAIN_LIMIT_S = 25.0
GARBAGE_EVERY_S = 30.0
SOS_KEPT_S = 2.0
LIST_LIMIT_S = 5.0
ON_HOST = Placement()


class ControlPlane:
    """
    One server of one host. `run` starts everything, says when it is ready, and drains exactly once.

    `engine` runs the agents, `where` is where this process is. `certificates` are files named by flags, by their
    place in the auth tree; `listen` is given who wants to see every line of the log. Ephemeral: it ends when its last
    sandbox and its last client are gone.
    """

    def __init__(
        self,
        settings: Settings,
        directories: Directories,
        rows: list[HostFeature],
        engine: HostEngine | DockerHost,
        where: Placement = ON_HOST,
        *,
        log_dir: Path | None = None,
        ephemeral: bool = False,
        certificates: Mapping[str, Path] = MappingProxyType({}),
        listen: Callable[[Callable[[Mapping[str, Any]], None]], None] = lambda _listener: None,
    ) -> None:
        self._listen = listen
        self._certificates = certificates
        self._settings = settings
        self._directories = directories
        self._rows = rows
        self._ephemeral = ephemeral
        self._group: asyncio.TaskGroup | None = None
        self._done = asyncio.Event()
        self._exit_code = 0
        firewall, logs = directories.firewall, log_dir or directories.logs

        self._manager = Manager(Path(settings.firewall.pin_dir), max_agents=settings.firewall.max_agents)
        self._engine = engine
        self._where = where
        self._ring = engine.ring if settings.firewall.host_ring else None
        network = engine.network
        self._events = Overseer()
        self._world = Worldview()
        self._events.attach(self._world)
        self._roster = Roster(tell_agent(self._events))
        self._connections = Connections()
        self._authority = InspectionAuthority(firewall / "certs")
        self._stack = chosen_stack(
            settings, directories, engine, where, environment(), admit=lambda one: self._side.see_neighbour(one)
        )
        self._envoy = EnvoyStack(
            self._stack.options, self._stack.process, self._authority, binary=settings.envoy.binary
        )
        self._access_log = AccessLogTail(self._stack.options.access_log, self._envoy.admin)
        self._enforcement = Enforcement(
            self._manager,
            engine,
            self._ring,
            self._roster,
            self._connections,
            plan=lambda: self._policy.plan,
            host_proxy_port=settings.host_proxy.port if settings.host_proxy.enabled else 0,
            inbound=engine.inbound(settings.firewall.inbound),
            session_port=engine.session_port,
        )
        self._names = PolicyNames()
        self._policy = Reconciler(
            RuleStore(firewall),
            AllocationFiles(firewall),
            self._envoy,
            KernelWhenUp(self._manager),
            self._enforcement,
            self._names,
        )
        self._flows = FlowLog(
            logs / "flows.jsonl", memory=settings.flows.memory, per_agent=settings.flows.memory_per_agent
        )
        self._reports = Reports(
            self._flows,
            self._roster,
            self._connections,
            self._manager,
            lambda: self._policy.plan.rule_ids,
            engine.exit_code,
            count=lambda flows: self._metrics.count_flows(flows),
            count_dns=lambda one: self._metrics.count_dns(one.verdict, one.duration_ns / 1e9, cached=one.cached),
        )
        self._gate = Gate(
            gate_settings(settings, network, front=self._stack.front, view=self._stack.view),
            agents=self._roster,
            policies=self._names,
            kernel=self._manager,
            records=self._reports,
            internal=ContainerNames(self._world),
        )
        self._enforcement.tell_withdrawn(self._gate.forget, self._reports.forget)
        engine.report_drops(self._reports.ring)
        self._make_services()

    def _make_services(self) -> None:
        """What other programs call: firewall, agents, sandboxes, status."""
        settings, directories, network = self._settings, self._directories, self._engine.network
        self._health = HealthRegistry()
        self._startup = CPStartupOrchestrator(components=self._health.components)
        self._metrics = Metrics(
            flows=self._flows,
            components=self._health.components,
            agents=lambda: self._status.agent_states(),
            state=lambda: self._status.policy_numbers(),
            maps=lambda: self._status.map_sizes(),
            ready=lambda: self._startup.is_ready,
            auth=lambda: self._surface.auth_counts(),
            tokens=lambda: self._surface.token_counts(),
            certificates=lambda: self._status.certificate_ends(),
        )
        self._metrics.describe(version("clawker-cp"), self._engine.name, self._stack.name, IMPLEMENTATION)
        self._tree = find_tree(directories.data, self._certificates)
        self._database = Database(directories.data / "controlplane" / "controlplane.db")
        self._quarantines = Quarantines(self._database)
        self._rules = RuleBook(self._policy, hits=lambda: self._reports.hits)
        self._agents = AgentControl(
            self._policy,
            self._enforcement,
            self._roster,
            self._quarantines,
            lambda reference: self._side.find(reference),
            bypass_default_s=settings.firewall.bypass_default_s,
            bypass_max_s=settings.firewall.bypass_max_s,
            acknowledge_disable=settings.firewall.on_disable == "acknowledge",
            exposures=lambda agent_id: self._side.exposures(agent_id),
        )
        self._firewall = FirewallControl(
            self._policy,
            self._manager,
            self._envoy,
            self._authority,
            self._rules,
            self._agents,
            load=self._load_kernel,
            running=self._running_names,
            gate_answers=partial(gate_answers, network.dns),
            publish_ca=self._write_bundle,
            take_over=lambda: self._certificate_keeper.take_over(),
            addresses=FirewallAddresses(network.proxy, network.dns, network.id, network.subnet),
            enrol_all=lambda: self._side.enrol_all(),
        )
        self._side = make_side(
            self._engine,
            settings,
            directories,
            self._policy,
            self._manager,
            self._enforcement,
            self._roster,
            self._reports,
            self._database,
            self._quarantines,
            self._firewall,
            self._events,
            idle=self._idle,
        )
        self._surface = ControlSurface(
            settings,
            directories,
            self._tree,
            self._database,
            self._startup,
            self._metrics,
            listen=self._where.listeners(network.cp),
        )
        self._status = ServerStatus(
            self._policy,
            self._manager,
            self._envoy,
            self._roster,
            self._tree,
            self._health,
            self._rows,
            Registry(self._database),
            self._flows,
            engine=self._side.name,
            dns_address=network.dns,
            up=lambda: self._firewall.up,
            is_ready=lambda: self._startup.is_ready,
            what_runs=implementations(settings, self._surface.tokens.implementation, self._stack.name),
            authority_answers=self._surface.tokens.answers,
            engine_answers=self._engine.answers,
            behind_gate=problem_of(self._stack.coredns),
            unjudged=self._firewall.guard.fault,
            enrolled=self._manager.agents,
            side=self._side,
            max_agents=settings.firewall.max_agents,
        )
        self._certificate_keeper = CertificateKeeper(
            self._tree,
            self._surface.tokens,
            self._authority,
            reconcile=self._policy.reconcile,
            up=lambda: self._firewall.up,
        )
        self._emptiness = DrainToZero(
            self._side.running, self._nothing_left, watcher_options(settings.drain), self._health
        )
        self._keeper = HealthKeeper(self._health, self._emptiness.guard(self._status.checks()), tell=self._surface.tell)

    def _servicers(self) -> tuple[object, object, object]:
        """AdminService, ControlService and AgentService over the domain handlers."""
        view = AgentView(
            self._roster,
            registry := Registry(self._database),
            self._agents,
            engine=self._side.name,
            enrolled=self._enforcement.enrolled,
            exposures=self._side.exposures,
            denied=self._side.denied,
        )
        revocation = TokenRevocation(self._surface.tokens.revocation, self._surface.make_auths())
        control = ControlServicer(
            RuleRpcs(self._rules, view, self._flows, grant_max_s=self._settings.firewall.grant_max_s),
            FlowRpcs(self._flows, self._events, view),
            AgentRpcs(self._status.status, view, view, revocation),
            SandboxRpcs(
                self._side.sandboxes,
                ids=lambda: host_ids(environment()),
                policy_of=self._roster.policy_of,
                inbound=self._settings.firewall.inbound,
            ),
        )
        registration = Registration(registry, registered=self._agents.registered)
        return new_admin_server(self._firewall, registry, start=self._startup), control, AgentServicer(registration)

    async def _running_names(self) -> list[str]:
        return [full_name(one.project, one.agent) for one in await self._side.running()]

    async def run(self, stop: asyncio.Event, *, on_ready: Callable[[], None]) -> int:
        """
        Serve until `stop`, or until the last sandbox is gone if ephemeral. Returns the exit code.
        """
        on_hangup(self._on_hangup)
        refuse_what_is_not_offered(self._settings)
        refuse_host(self._rows)
        make_directories(self._directories)
        async with AsyncExitStack() as drain:
            drain.callback(take_pid_file().close)
            await asyncio.to_thread(self._open_files)
            await self._stack.prepare()
            drain.callback(self._database.close)
            await drain.enter_async_context(self._surface.tokens.supervised())
            await self._serve(stop, on_ready, drain)
        return self._exit_code

    def _open_files(self) -> None:
        """Certificates, the database, the authority's keys: verified before anything is bound."""
        if self._tree.is_ours:
            self._tree.ensure()
        else:
            self._tree.verify()
        self._database.open()
        self._surface.tokens.load(time.time())

    async def _serve(self, stop: asyncio.Event, on_ready: Callable[[], None], drain: AsyncExitStack) -> None:
        self._listen(EventBridge(self._events, asyncio.get_running_loop()))
        self._listen(self._metrics.note)
        log.info("cp_starting", pid=os.getpid(), state=str(self._directories.state))
        fresh = not (Path(self._settings.firewall.pin_dir) / "control").exists()
        await self._side.prepare()
        ending, ready = Drain(DRAIN_LIMIT_S), False
        try:
            async with asyncio.TaskGroup() as group:
                running = await self._start(group, drain)
                ready = True
                self._startup.set_ready()
                log.info("cp_ready", agents=len(self._roster))
                on_ready()
                # Modules and what was built once: walking them held the loop for 70 to 100 ms at each full collection.
                gc.freeze()
                await self._wait_for_end(stop, group)
                await self._stop_serving(ending)
                for task in running:
                    task.cancel()
                await ending.stage("policy", partial(wait_ended, self._reconciling))
        except Exception as error:  # said, and raised again
            log.error("cp_serve_failed", cause=leaf_text(error), effect="draining" if ready else "not started")
            raise
        finally:
            # However a server that was ready ends, a failed part included, it drains once; a second signal ends that.
            # One that never was leaves what it found (I2); what it made itself, where nothing was, it takes away.
            if (ready or fresh) and not cancelled():
                await self._stop_serving(ending)
                await self._drain(ending)

    async def _stop_serving(self, ending: Drain) -> None:
        """Take nothing new; what was accepted goes on."""
        self._group = None
        ending.begin(agents=len(self._roster))
        self._side.close()
        self._policy.close()
        await ending.stage("listeners", self._surface.close)

    async def _start(self, group: asyncio.TaskGroup, drain: AsyncExitStack) -> list[asyncio.Task[None]]:
        """Open what others call, bring the firewall up, take over what runs; returns what is cancelled at the end."""
        try:
            await self._surface.open(group, *self._servicers(), self._side.resolver)
            await self._gate.start(group)
            drain.push_async_callback(self._gate.aclose)
            await asyncio.to_thread(self._authority.open)
            self._write_bundle()
            if self._settings.cli.firewall.enable or self._side.living():
                await self._firewall.bring_up()
                self._surface.probe_also(self._status.probes())
            self._access_log.open()
            running = self._start_parts(group)
            running += await self._side.take_over(group, self._agents)
        except BaseException as error:
            self._startup.set_failed(str(error) or type(error).__name__)
            if not self._ephemeral and isinstance(error, Exception):
                await asyncio.sleep(SOS_KEPT_S)  # whoever watches the start hears why
            await self._surface.close()
            raise
        self._group = group  # from here on a hangup is a reload
        return running

    def _write_bundle(self) -> None:
        write_bundle(self._directories.data / "ca-bundle", self._stack.roots, self._authority.certificate_pem())

    async def _load_kernel(self) -> None:
        """Attach the programs, drop rows of cgroups that are gone, and tell them what no rule opens."""
        await asyncio.to_thread(self._manager.load, self._engine.parent_cgroup)
        living = await self._side.cgroups()
        for cgroup_id in set(self._manager.agents()) - living:
            self._manager.withdraw(cgroup_id)  # its cgroup is gone, and ids are not reused
        await self._learn_addresses()

    def _start_parts(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Start what runs beside serving; all but the reconciler are retried when they fail."""
        parts: list[tuple[str, Callable[[], Awaitable[None]], str]] = [
            ("envoy", self._firewall.supervise_proxy, "new proxied connections are refused"),
            ("links", self._firewall.guard.run, "links that somebody takes away stay away"),
            ("kernel_events", self._reports.poll_kernel, "kernel decisions are not recorded"),
            ("flows", self._flows.run, "flow records on disk"),
            ("access_log", partial(self._access_log.run, self._reports.proxy), "proxy decisions are not recorded"),
            ("garbage", self._collect_garbage, "expired names stay a while"),
            ("bypasses", self._agents.run, "connections outlive a bypass until their next packet"),
            *self._side.parts(),
            *coredns_part(self._stack.coredns),
            ("bus", self._events.heartbeat, "a stuck part is not noticed"),
            ("health", self._keeper.run, "health is not known"),
            ("certificates", self._certificate_keeper.run, "certificates are not renewed"),
            ("loop_lag", self._metrics.watch_loop, "how late the loop runs is not measured"),
        ]
        if self._settings.drain.to_zero and not self._ephemeral:
            parts.append(("drain_to_zero", self._emptiness.run, "the server does not end by itself"))
        # Not among those that are cancelled: `close` lets it finish what it has accepted.
        self._reconciling = group.create_task(self._policy.run(), name="reconciler")
        return [
            group.create_task(supervise(name, factory, blast_radius=radius), name=name)
            for name, factory, radius in parts
        ]

    def _on_hangup(self) -> None:
        """Reload; what starts reads the rules anyway, and what drains has no use for them."""
        if self._group is not None:
            self._group.create_task(self._firewall.reread(), name="reload")

    async def _wait_for_end(self, stop: asyncio.Event, group: asyncio.TaskGroup) -> None:
        broken = group.create_task(self._surface.wait_broken(), name="broken")
        waits = [broken, *(group.create_task(event.wait(), name="end") for event in (stop, self._done))]
        ended, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self._exit_code = int(broken in ended)
        for task in waits:
            task.cancel()

    async def _drain(self, ending: Drain) -> None:
        """Stage by stage; enforcement goes only when nothing of an agent lives (R24)."""
        empty = await self._nothing_lives()
        await ending.stage("envoy", self._envoy.stop if empty else self._envoy.leave)
        leave = self._manager.flush if empty else self._manager.close
        await ending.stage("kernel", partial(asyncio.to_thread, leave))
        for name, stage in self._side.stages(empty=empty):
            await ending.stage(name, stage)
        await ending.stage("bus", self._events.aclose)
        log.info("drain_done", enforcement="removed" if empty else "stays pinned")

    async def _nothing_lives(self) -> bool:
        """Whether no agent runs; what cannot be known may run (I2)."""
        try:
            async with asyncio.timeout(LIST_LIMIT_S):
                return not await self._side.running()
        except (ClawkerError, OSError, TimeoutError) as error:
            log.warning("drain_agents_unknown", cause=str(error), effect="enforcement stays pinned")
            return False

    async def _nothing_left(self) -> None:
        self._done.set()

    def _idle(self) -> None:
        if self._ephemeral:
            self._done.set()

    async def _collect_garbage(self) -> None:
        while True:
            await asyncio.sleep(GARBAGE_EVERY_S)
            if self._firewall.up:
                self._manager.collect_garbage()
                await self._learn_addresses()

    async def _learn_addresses(self) -> None:
        await learn_addresses(self._settings, self._engine, self._ring, self._policy, self._manager, self._gate)
