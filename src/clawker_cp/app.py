"""
The composition root: what the server is made of, in the order it starts and drains.

Reads top to bottom. Nothing here decides anything a package could own; adapters between packages
are in `wiring`.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import os
import platform
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from clawker_cp.agents.lifecycle import LifeRequest, SandboxLives
from clawker_cp.agents.roster import Roster
from clawker_cp.config import Directories, Settings, environment, load_settings
from clawker_cp.dns.gate import Gate
from clawker_cp.dns.settings import BudgetSettings, GateSettings
from clawker_cp.ebpf import Manager
from clawker_cp.engines.base import HostFeature, Sandbox, SandboxSpec
from clawker_cp.engines.host.cgroups import find_cgroup2
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.engines.host.network import gateway_of
from clawker_cp.engines.host.preflight import host_features
from clawker_cp.errors import ClawkerError, Conflict, InvalidInput, Unsupported
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.envoy.access_log import AccessLogTail
from clawker_cp.firewall.envoy.options import EnvoyOptions, find_binary, find_roots
from clawker_cp.firewall.envoy.stack import EnvoyStack, envoy_command
from clawker_cp.firewall.inspection import InspectionAuthority
from clawker_cp.firewall.plan import Topology
from clawker_cp.firewall.reconcile import Reconciler
from clawker_cp.firewall.resolving import PolicyNames
from clawker_cp.firewall.rules import agent_scope
from clawker_cp.firewall.store import RuleStore
from clawker_cp.processes.lasting import LastingProcess
from clawker_cp.rpc.local_protocol import SOCKET_NAME
from clawker_cp.rpc.local_server import ORPHAN_GRACE_S, LocalServer
from clawker_cp.runtime.tasks import supervise
from clawker_cp.telemetry.connections import Connections
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.wiring.enforcement import HostEnforcement
from clawker_cp.wiring.reports import Reports

log = structlog.get_logger()

RUN_DIRECTORY = Path("/run/clawker")
PID_FILE = "cp.pid"
DRAIN_LIMIT_S = 25.0
GARBAGE_EVERY_S = 30.0
UNCLAIMED_S = 30.0  # how long an adopted sandbox waits for its client
NO_RULES = "rules: []\n"
NEVER_ROUTED = ("127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4", "0.0.0.0/8", "::1/128", "fe80::/10")


def load_configuration(*, config_dir: Path | None = None, data_dir: Path | None = None) -> tuple[Settings, Directories]:
    """
    Settings and directories of this process, flags over environment.
    """
    directories = Directories.from_environment(environment())
    directories = Directories(
        config=config_dir or directories.config,
        data=data_dir or directories.data,
        state=directories.state,
        cache=directories.cache,
    )
    return load_settings(directories, environment()), directories


def preflight(settings: Settings) -> list[HostFeature]:
    """
    What this host has of what enforcement needs. Looks only; changes nothing.
    """
    root = os.geteuid() == 0
    nothing = "nothing can be enforced"
    pin_parent = Path(settings.firewall.pin_dir).parent
    docker = Path("/var/run/docker.sock").exists()
    rows = [
        HostFeature(
            "root", root, required=True, detail="running as root" if root else "not root", need="run with sudo",
            cost=nothing,
        ),
        HostFeature(
            "kernel", _kernel_at_least(6, 2), required=True, detail=platform.release(), need="Linux 6.2 or later",
            cost=nothing,
        ),
        HostFeature(
            "BTF", Path("/sys/kernel/btf/vmlinux").exists(), required=True, detail="/sys/kernel/btf/vmlinux",
            need="a kernel with CONFIG_DEBUG_INFO_BTF", cost=nothing,
        ),
        HostFeature(
            "bpffs", _is_bpffs(pin_parent), required=True, detail=str(pin_parent),
            need=f"mount -t bpf bpf {pin_parent}", cost="enforcement would not survive the control plane",
        ),
    ]  # fmt: skip
    for name, find in (("cgroup2", find_cgroup2), ("envoy", partial(find_binary, settings.envoy.binary))):
        try:
            rows.append(HostFeature(name, True, required=True, detail=str(find())))
        except ClawkerError as error:
            rows.append(HostFeature(name, False, required=True, detail=str(error), need=error.hint or "", cost=nothing))
    rows += [
        replace(row, required=settings.firewall.host_ring) if row.name == "host ring" else row
        for row in host_features(settings.host.bridge, settings.host.subnet, gateway_of(settings.host.subnet))
    ]
    rows.append(
        HostFeature(
            "docker", docker, required=False, detail="daemon socket" if docker else "no daemon",
            need="a Docker daemon", cost="sandboxes of this host only",
        )
    )  # fmt: skip
    return rows


def _kernel_at_least(major: int, minor: int) -> bool:
    numbers = platform.release().split("-")[0].split(".")
    return tuple(int(n) for n in numbers[:2] if n.isdecimal()) >= (major, minor)


def _is_bpffs(path: Path) -> bool:
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return False
    return any(line.split()[4] == str(path) and " - bpf " in line for line in mounts.splitlines())


class ControlPlane:
    """
    One server of one host. `run` starts everything, says when it is ready, and drains exactly once.

    Ephemeral: it ends when its last sandbox and its last client are gone.
    """

    def __init__(
        self,
        settings: Settings,
        directories: Directories,
        rows: list[HostFeature],
        *,
        log_dir: Path | None = None,
        ephemeral: bool = False,
    ) -> None:
        self._settings = settings
        self._directories = directories
        self._rows = rows
        self._ephemeral = ephemeral
        self._done = asyncio.Event()
        firewall = directories.firewall
        logs = log_dir or directories.logs

        self._manager = Manager(Path(settings.firewall.pin_dir), max_agents=settings.firewall.max_agents)
        self._engine = HostEngine(
            state_dir=directories.state,
            bridge=settings.host.bridge,
            subnet=settings.host.subnet,
            cgroup_parent=settings.host.cgroup_parent,
            masked=(directories.config, directories.data, directories.state, directories.cache),
            ca_dir=directories.data / "ca-bundle",
            with_ring=settings.firewall.host_ring,
            on_drop=lambda event: self._reports.ring(event),
        )
        self._roster = Roster()
        self._connections = Connections()
        self._authority = InspectionAuthority(firewall / "certs")
        options = EnvoyOptions(
            directory=firewall / "envoy",
            proxy_addr=self._engine.gateway,
            roots=Path(settings.envoy.trusted_ca) if settings.envoy.trusted_ca else find_roots(),
            resolver=("127.0.0.1", settings.dns.proxy_view_port),
            concurrency=settings.envoy.concurrency,
            http3=settings.envoy.http3,
        )
        self._options = options
        process = LastingProcess(
            "envoy",
            envoy_command(find_binary(settings.envoy.binary), options),
            firewall / "envoy.pid",
            options.log,
        )
        self._envoy = EnvoyStack(options, process, self._authority)
        self._access_log = AccessLogTail(options.access_log, self._envoy.admin)
        self._enforcement = HostEnforcement(
            self._manager,
            self._engine,
            self._roster,
            self._connections,
            plan=lambda: self._policy.plan,
            host_ring=settings.firewall.host_ring,
        )
        self._names = PolicyNames()
        self._policy = Reconciler(
            RuleStore(firewall), AllocationFiles(firewall), self._envoy, self._manager, self._enforcement, self._names
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
            self._engine.exit_code,
        )
        self._gate = Gate(
            gate_settings(settings, self._engine.gateway),
            agents=self._roster,
            policies=self._names,
            kernel=self._manager,
            records=self._reports,
        )
        self._enforcement.tell_withdrawn(self._gate.forget, self._reports.forget)
        self._lives = SandboxLives(self._engine, self._policy, self._enforcement, self._roster, self._reports.settle)
        self._local = LocalServer(
            directories.state / SOCKET_NAME,
            self._lives,
            self._reports,
            partial(life_request, inbound=settings.firewall.inbound),
        )

    async def run(self, stop: asyncio.Event, *, on_ready: Callable[[], None]) -> int:
        """
        Serve until `stop`, or until the last sandbox is gone if ephemeral. Returns the exit code.
        """
        refuse_what_is_not_offered(self._settings)
        missing = [row for row in self._rows if row.required and not row.present]
        if missing:
            raise Unsupported(
                f"this host cannot enforce: {', '.join(row.name for row in missing)} missing",
                feature=missing[0].name,
                needs=missing[0].need,
                hint="; ".join(row.need for row in missing),
            )
        self._make_directories()
        async with AsyncExitStack() as drain:
            drain.callback(self._take_pid_file().close)
            await self._serve(stop, on_ready, drain)
        return 0

    async def _serve(self, stop: asyncio.Event, on_ready: Callable[[], None], drain: AsyncExitStack) -> None:
        log.info("cp_starting", pid=os.getpid(), state=str(self._directories.state))
        await self._engine.start()
        adopted = self._engine.living()
        report = await asyncio.to_thread(self._manager.load, self._engine.parent_cgroup)
        for cgroup_id in set(self._manager.agents()) - {sandbox.cgroup_id for sandbox in adopted}:
            self._manager.withdraw(cgroup_id)  # its cgroup is gone, and ids are not reused
        await self._learn_addresses()
        self._authority.open()
        self._write_bundle()
        ready = False
        try:
            async with asyncio.TaskGroup() as group:
                await self._gate.start(group)
                drain.push_async_callback(self._gate.aclose)
                for sandbox in adopted:
                    request = adopted_request(sandbox.spec)
                    self._policy.preload(
                        agent_scope(sandbox.project, sandbox.agent), request.rules, learn=request.learn
                    )
                await self._policy.start()
                for sandbox in adopted:
                    await self._adopt(sandbox)
                self._access_log.open()
                self._local.open()
                running = self._start_parts(group)
                running += [group.create_task(self._follow_adopted(s.id), name="adopted") for s in adopted]
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup, group)
                log.info("cp_ready", agents=len(adopted), adopted=report.adopted)
                ready = True
                on_ready()
                await self._wait_for_end(stop, group)
                log.info("drain_started", agents=len(self._lives))
                self._local.close()
                for task in running:
                    task.cancel()
                self._policy.close()
        finally:
            # However a server that was ready ends, a failed part included, it drains once.
            if ready:
                self._local.close()
                await self._drain()

    def _start_parts(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Start what runs beside serving; all but the reconciler are retried when they fail."""
        parts: list[tuple[str, Callable[[], Awaitable[None]], str]] = [
            ("envoy", self._envoy.supervise, "new proxied connections are refused"),
            ("kernel_events", self._reports.poll_kernel, "kernel decisions are not recorded"),
            ("flows", self._flows.run, "flow records on disk"),
            ("access_log", partial(self._access_log.run, self._reports.proxy), "proxy decisions are not recorded"),
            ("garbage", self._collect_garbage, "expired names stay a while"),
        ]
        # Not among those that are cancelled: `close` lets it finish what it has accepted.
        group.create_task(self._policy.run(), name="reconciler")
        tasks = [
            group.create_task(supervise(name, factory, blast_radius=radius), name=name)
            for name, factory, radius in parts
        ]
        return [*tasks, group.create_task(self._local.serve(self._client_gone), name="local")]

    async def _adopt(self, sandbox: Sandbox) -> None:
        """Take one sandbox over; one that cannot be is left as the kernel has it and does not stop the others."""
        try:
            await self._lives.adopt(sandbox, adopted_request(sandbox.spec))
        except ClawkerError as error:
            log.error("enroll_failed", id=sandbox.id[:12], cause=str(error))

    def _on_hangup(self, group: asyncio.TaskGroup) -> None:
        group.create_task(self._reload(), name="reload")

    async def _reload(self) -> None:
        """SIGHUP: read the rules files again; a bad one changes nothing and is said in the log."""
        try:
            applied = await self._policy.reload()
        except ClawkerError as error:
            log.error("policy_refused", cause=str(error), code=error.code)
        else:
            log.info("policy_reloaded", version=applied.version, live=applied.live)

    async def _wait_for_end(self, stop: asyncio.Event, group: asyncio.TaskGroup) -> None:
        stopping = group.create_task(stop.wait(), name="signal")
        done = group.create_task(self._done.wait(), name="last-sandbox")
        await asyncio.wait([stopping, done], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        done.cancel()

    async def _drain(self) -> None:
        """Stage by stage, each contained; enforcement goes only when nothing of an agent lives (R24)."""
        empty = not self._engine.living()
        for name, stage in (
            ("envoy", self._envoy.stop if empty else self._envoy.leave),
            ("kernel", self._flush if empty else self._leave_kernel),
            ("engine", lambda: self._engine.aclose(remove=empty)),
        ):
            try:
                async with asyncio.timeout(DRAIN_LIMIT_S):
                    await stage()
                log.info("drain_stage", stage=name)
            except (ClawkerError, OSError, TimeoutError) as error:
                log.warning("drain_stage_failed", stage=name, cause=str(error))
        log.info("drain_done", enforcement="removed" if empty else "stays pinned")

    async def _flush(self) -> None:
        await asyncio.to_thread(self._manager.flush)

    async def _leave_kernel(self) -> None:
        self._manager.close()

    def _client_gone(self) -> None:
        if self._ephemeral and self._local.idle and not len(self._lives):
            self._done.set()

    async def _follow_adopted(self, sandbox_id: str) -> None:
        """Take an adopted sandbox apart at its end; end it if nobody comes back for it."""
        try:
            async with asyncio.TaskGroup() as group:
                finishing = group.create_task(self._lives.finish(sandbox_id), name="adopted-end")
                await asyncio.wait([finishing], timeout=UNCLAIMED_S)
                if not finishing.done() and not self._local.attached(sandbox_id):
                    log.warning("agents_adopted_unclaimed", id=sandbox_id[:12])
                    await self._lives.stop(sandbox_id, grace_s=ORPHAN_GRACE_S)
        except* ClawkerError as group_error:
            log.info("agents_adopted_gone", id=sandbox_id[:12], cause=str(group_error.exceptions[0]))
        self._reports.ending(sandbox_id)
        self._client_gone()

    async def _collect_garbage(self) -> None:
        while True:
            await asyncio.sleep(GARBAGE_EVERY_S)
            self._manager.collect_garbage()
            await self._learn_addresses()

    async def _learn_addresses(self) -> None:
        """Keep this host's own addresses, as they are now, out of every rule's reach (R12)."""
        addresses = await self._engine.host_addresses()
        reserved = [ipaddress.ip_network(text) for text in (self._engine.subnet, *NEVER_ROUTED, *addresses)]
        self._policy.use_topology(
            Topology(
                reserved=tuple(reserved),
                http3=self._settings.envoy.http3,
                tls_minimal=self._settings.firewall.tls_auto == "minimal",
            )
        )
        self._manager.set_reserved(reserved)
        self._gate.set_reserved(reserved)
        if self._settings.firewall.host_ring:
            await self._engine.ring.reserve([str(network) for network in reserved])

    def _make_directories(self) -> None:
        self._directories.firewall.mkdir(parents=True, exist_ok=True, mode=0o755)
        self._directories.state.mkdir(parents=True, exist_ok=True, mode=0o711)
        RUN_DIRECTORY.mkdir(parents=True, exist_ok=True, mode=0o755)

    def _write_bundle(self) -> None:
        """System roots and our inspection CA, as sandboxes get them (contract 8.6)."""
        directory = self._directories.data / "ca-bundle"
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        Path("/usr/local/share/clawker/ca").mkdir(parents=True, exist_ok=True)
        own = self._authority.certificate_pem()
        for name, text in (("ca.pem", own), ("bundle.pem", self._options.roots.read_text() + own)):
            temporary = directory / f".clawker-{name}.tmp"
            temporary.write_text(text)
            temporary.chmod(0o644)
            temporary.replace(directory / name)

    def _take_pid_file(self) -> Any:
        path = RUN_DIRECTORY / PID_FILE
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise Conflict(
                f"a control plane runs on this host already (see {path})",
                code="ALREADY_RUNNING",
                hint="`clawker-cp run` joins it",
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return file


def gate_settings(settings: Settings, gateway: str) -> GateSettings:
    """
    The gate's settings from the operator's and the engine's gateway.
    """
    budget = settings.dns.budget
    return GateSettings(
        address=gateway,
        proxy_view_port=settings.dns.proxy_view_port,
        forwarders=tuple(settings.dns.forwarders),
        zones={zone: tuple(servers) for zone, servers in settings.dns.zones.items()},
        control_plane_address=gateway,
        host_proxy_address=gateway,
        gateway_address=gateway,
        internal_names=tuple(settings.dns.internal_names),
        budget=BudgetSettings(names=budget.names, name_bytes=budget.bytes, txt=budget.txt),
    )


def refuse_what_is_not_offered(settings: Settings) -> None:
    """
    Raise `Unsupported` for settings that ask for something this version does not do.

    A setting that is accepted and then ignored would be worse than an error.
    """
    asked = {
        "engine: docker": settings.engine == "docker",
        "stack: container": settings.stack == "container",
        f"dns.coredns: {settings.dns.coredns}": bool(settings.dns.coredns),
        "oauth.implementation: hydra": settings.oauth.implementation == "hydra",
        f"fleet.name: {settings.fleet.name}": bool(settings.fleet.name),
        f"telemetry.otlp_endpoint: {settings.telemetry.otlp_endpoint}": bool(settings.telemetry.otlp_endpoint),
        "firewall.on_exposure: quarantine": settings.firewall.on_exposure == "quarantine",
    }
    for what, wanted in asked.items():
        if wanted:
            raise Unsupported(
                f"{what} is not offered by this version",
                feature=what.partition(":")[0],
                hint="take it out of control-plane.yaml; docs/operations.md says what is in effect",
            )


def life_request(request: Mapping[str, Any], *, inbound: str = "host") -> LifeRequest:
    """
    A client's request as spec and rules; the rules stay with the record for an adopting start.

    Raises `InvalidInput` naming what is missing or wrong, and for a port to publish where
    `firewall.inbound` is `none` (R33).
    """
    rules = request.get("rules", NO_RULES)
    if not isinstance(rules, str):
        raise InvalidInput("rules: has to be a YAML document as text")
    learn = bool(request.get("learn", False))
    try:
        spec = SandboxSpec.from_mapping({**request, "extra": {"rules": rules, "learn": learn}})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"the request to run a sandbox is malformed: {error}") from error
    if spec.publish and inbound == "none":
        raise InvalidInput("--publish: firewall.inbound is none, no port is published", hint="set it to host")
    return LifeRequest(spec, rules, learn)


def adopted_request(spec: SandboxSpec) -> LifeRequest:
    """
    The request an adopted sandbox was started with.
    """
    return LifeRequest(spec, str(spec.extra.get("rules", NO_RULES)), bool(spec.extra.get("learn", False)))
