"""
The host engine's front: create, run, wait, signal, remove, adopt, sweep.

A sandbox is made in two steps so that enrolment fits between: `create` gives it an address, a
network namespace and an empty cgroup; `run` starts its first process. Records on disk let the
next start adopt what runs and sweep what is dead.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from clawker_cp.engines.base import AgentNetwork, RingEvent, Sandbox, SandboxSpec
from clawker_cp.engines.host import cgroups, network, process
from clawker_cp.engines.host.bubble import OPEN_FILES
from clawker_cp.engines.host.console import discard
from clawker_cp.engines.host.endings import Endings
from clawker_cp.engines.host.filesystem import check_view, etc_files
from clawker_cp.engines.host.nflog import RingLog
from clawker_cp.engines.host.publish import Publisher
from clawker_cp.engines.host.records import read_record, write_record
from clawker_cp.engines.host.ring import DEFAULT_GROUP, HostRing, forwarding, set_forwarding
from clawker_cp.engines.host.sockets import SocketInfo, cut_sockets, list_sockets
from clawker_cp.engines.host.spec_check import check_spec
from clawker_cp.errors import Conflict, InvalidInput, NotFound, Unavailable
from clawker_cp.runtime.gate import Gate
from clawker_cp.runtime.tasks import in_thread_to_the_end

log = structlog.get_logger()

PREFIX = "clawker"
KILL_LIMIT_S = 5.0
MAX_SIGNAL = 64
TELL_LIMIT_S = 1.0
FORWARDING_MARK = "forwarding-before"


class HostEngine:
    """
    Sandboxes on this host. Construction does nothing; `start` makes bridge, parent cgroup and ring.

    Not safe for two instances on one `state_dir` or bridge: the server's pid file sees to that.
    """

    def __init__(
        self,
        *,
        state_dir: Path,
        bridge: str,
        subnet: str,
        cgroup_parent: str,
        masked: Sequence[Path] = (),
        ca_dir: Path | None = None,
        with_ring: bool = True,
        extra_tuples: Sequence[tuple[str, int]] = (),
        ring_group: int = DEFAULT_GROUP,
        open_files: int = OPEN_FILES,
        on_drop: Callable[[RingEvent], None] | None = None,
    ) -> None:
        self._state = state_dir / "sandboxes"
        self._bridge = bridge
        self.subnet = subnet
        self.gateway = network.gateway_of(subnet)
        self._parent_name = cgroup_parent
        self._masked = tuple(masked)
        self._ca_dir = ca_dir
        self.ring = HostRing(bridge, subnet, self.gateway, group=ring_group, extra_tuples=extra_tuples)
        self._with_ring = with_ring
        self._open_files = open_files
        self._on_drop = on_drop
        self._log: RingLog | None = None
        self._pool = network.AddressPool(subnet)
        self._limiter: cgroups.Limiter | None = None
        self._owners: dict[int, str] = {}
        self._publisher = Publisher(self.gateway)
        self._sandboxes: dict[str, Sandbox] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._endings = Endings(state_dir / "endings")
        self._creating = asyncio.Lock()
        self._removing: dict[str, asyncio.Event] = {}
        self._left: set[str] = set()

    name = "host"
    session_port = 0  # its sandboxes run no agent daemon (R32)

    def inbound(self, setting: str) -> str:
        """
        Who may come in where `firewall.inbound` says so: a sandbox's ports are on loopback only (R33).
        """
        return "none" if setting == "none" else "host"

    async def answers(self) -> str:
        """
        What is wrong with the engine, "" if nothing is.
        """
        return "" if self.parent_cgroup.is_dir() else "the agents' parent cgroup is gone"

    def report_drops(self, on_drop: Callable[[RingEvent], None]) -> None:
        """
        Say, before `start`, who is told of packets that the ring drops.
        """
        self._on_drop = on_drop

    @property
    def network(self) -> AgentNetwork:
        """Where sandboxes live; everything of ours is at the gateway (contract 1.3)."""
        gateway = self.gateway
        return AgentNetwork(
            f"host:{self._bridge}", self.subnet, gateway, self._bridge, gateway, gateway, gateway, gateway
        )

    @property
    def parent_cgroup(self) -> Path:
        return cgroups.find_cgroup2() / self._parent_name

    async def start(self) -> None:
        """
        Make what all sandboxes share, adopt those that still run, and sweep dead remains.
        """
        cgroups.ensure(self.parent_cgroup)
        self._limiter = cgroups.Limiter(self.parent_cgroup)
        self._limiter.prepare()
        forwarded_before = self._forwarded_before()
        await network.ensure_bridge(self._bridge, self.subnet)
        self._state.mkdir(parents=True, exist_ok=True, mode=0o711)
        self._endings.load()
        dead = []
        for directory in sorted(self._state.iterdir()):
            sandbox = read_record(directory)
            if sandbox is None:
                await asyncio.to_thread(discard, directory)
                continue
            await process.decided(sandbox)
            if process.runs(sandbox):
                self._sandboxes[sandbox.id] = sandbox
                self._own(sandbox)
                self._pool.skip_past(sandbox.address)
                log.info("engines_sandbox_adopted", id=sandbox.id, address=sandbox.address)
            else:
                dead.append(sandbox)
        living = [(sandbox.interface, sandbox.address) for sandbox in self._sandboxes.values()]
        if self._with_ring:
            await self.ring.install(living, forwarded_before=forwarded_before)
            self._watch_drops()
        for sandbox in dead:
            await cgroups.kill(sandbox.cgroup_path, KILL_LIMIT_S)
            await self._take_apart(sandbox)
        await self._sweep()
        for sandbox in self._sandboxes.values():
            await self._publish_again(sandbox)

    def living(self) -> list[Sandbox]:
        """
        Every sandbox that exists now.
        """
        return list(self._sandboxes.values())

    def by_address(self, address: str) -> Sandbox | None:
        """
        The sandbox that has the address, exactly one or None (contract 9.9).
        """
        found = [sandbox for sandbox in self._sandboxes.values() if sandbox.address == address]
        return found[0] if len(found) == 1 else None

    def exit_code(self, sandbox_id: str) -> int | None:
        """
        The exit code of a sandbox that has ended, as long as it is remembered.
        """
        return self._endings.get(sandbox_id)

    async def host_addresses(self) -> list[str]:
        return await network.host_addresses()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """
        Make a sandbox in which nothing runs. All or nothing.

        Raises `InvalidInput` for a spec that cannot be, `Conflict` for a name in use.
        """
        check_spec(spec)
        check_view(spec, self._masked)
        async with self._creating:
            for other in self._sandboxes.values():
                if (other.project, other.agent) == (spec.project, spec.agent):
                    raise Conflict(f"--agent: {spec.agent} of project {spec.project or '(none)'} runs already")
            sandbox_id = secrets.token_hex(32)
            short = sandbox_id[:9]
            cgroup_path = self.parent_cgroup / f"{PREFIX}-{sandbox_id[:12]}"
            sandbox = Sandbox(
                id=sandbox_id,
                spec=spec,
                address=self._pool.take(other.address for other in self._sandboxes.values()),
                netns=f"{PREFIX}-{sandbox_id[:12]}",
                interface=f"{network.interface_prefix(self._bridge)}{short}",
                cgroup_path=cgroup_path,
                cgroup_id=0,
                directory=self._state / sandbox_id,
            )
            self._sandboxes[sandbox_id] = sandbox
        try:
            self._lay_out(sandbox)
            sandbox.cgroup_id = cgroups.ensure(cgroup_path)
            if self._limiter is not None:
                sandbox.limits_unmet = self._limiter.apply(cgroup_path.name, spec.limits)
            # Known on disk before anything exists that only the record tells about.
            write_record(sandbox)
            await network.add_sandbox(sandbox.netns, sandbox.interface, self._bridge, sandbox.address, self.subnet)
            self._own(sandbox)
            if self._with_ring:
                await self.ring.pin(sandbox.interface, sandbox.address)
            sandbox.publish = await self._publisher.publish(sandbox.id, sandbox.address, spec.publish)
            write_record(sandbox)
        except BaseException:
            await asyncio.shield(self.remove(sandbox_id, force=True, grace_s=0))
            raise
        return sandbox

    async def run(self, sandbox_id: str, streams: tuple[int, int, int]) -> None:
        """
        Start the command on the given streams, which stay the caller's and are open until this returns or raises.
        """
        sandbox = self._known(sandbox_id)
        if sandbox.pid:
            raise Conflict(f"sandbox {sandbox_id[:12]} was started already")
        extra = self._limiter.joined(sandbox.cgroup_path.name) if self._limiter is not None else []

        def start() -> None:
            with Gate() as gate:
                started = process.launch(
                    sandbox,
                    streams,
                    gate,
                    cgroups=[sandbox.cgroup_path, *extra],
                    netns=network.namespace_path(sandbox.netns),
                    masked=self._masked,
                    ca_dir=self._ca_dir,
                    open_files=self._open_files,
                )
                self._processes[sandbox_id] = started
                sandbox.pid, sandbox.started = started.pid, process.start_time(started.pid)
                # Known on disk before it runs: a server that is killed leaves no command, or one to adopt.
                write_record(sandbox)
                gate.open()

        # A caller that was cancelled closes the streams, and their numbers are given to the next that asks: the
        # command would write into that, be it the input of an `nft` that we run.
        await in_thread_to_the_end(start)

    async def wait(self, sandbox_id: str) -> int:
        """
        Wait for the command's end and return its exit code; at once for one that has ended.
        """
        known = self._endings.get(sandbox_id)
        if known is not None:
            return known
        sandbox = self._known(sandbox_id)
        if not sandbox.pid:
            raise Conflict(f"sandbox {sandbox_id[:12]} was not started yet")
        await process.wait_gone(sandbox.pid, sandbox.started)
        return self._end_of(sandbox)

    async def signal(self, sandbox_id: str, signo: int) -> None:
        """
        Deliver a signal to the command; those a terminal sends go to its whole job.
        """
        if not 1 <= signo <= MAX_SIGNAL:
            raise InvalidInput(f"signal: {signo} is not between 1 and {MAX_SIGNAL}")
        process.send(await process.command_pid(self._known(sandbox_id)), signo)

    async def pause(self, sandbox_id: str, *, on: bool) -> None:
        """
        Stop or continue every process of a sandbox.
        """
        cgroups.freeze(self._known(sandbox_id).cgroup_path, on=on)

    async def kill(self, sandbox_id: str) -> None:
        """
        SIGKILL everything of a sandbox; its exit code becomes 137.
        """
        process.kill_init(self._known(sandbox_id))
        await cgroups.kill(self._known(sandbox_id).cgroup_path, KILL_LIMIT_S)

    async def stop(self, sandbox_id: str, *, grace_s: float) -> None:
        """
        End every process of a sandbox, first with SIGTERM and its grace; one that is gone is fine.
        """
        while sandbox_id in self._removing:
            await self._removing[sandbox_id].wait()
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is not None:
            await self._stop(sandbox, grace_s)

    async def remove(self, sandbox_id: str, *, force: bool, grace_s: float) -> None:
        """
        End a sandbox and take everything of it away; one that is gone is fine.

        Raises `Conflict` AGENT_RUNNING for a running one without `force`. What fails leaves it listed, with its name
        and its address, for the next call.
        """
        while sandbox_id in self._removing:
            await self._removing[sandbox_id].wait()
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            return
        if not force and (process.runs(sandbox) or cgroups.is_populated(sandbox.cgroup_path)):
            raise Conflict(f"sandbox {sandbox_id[:12]} is running", code="AGENT_RUNNING", hint="remove it with force")
        done = self._removing[sandbox_id] = asyncio.Event()
        try:
            await self._stop(sandbox, grace_s)
            await self._take_apart(sandbox)
            self._sandboxes.pop(sandbox_id, None)
            started = self._processes.pop(sandbox_id, None)
            if started is not None:
                started.poll()
        finally:
            self._left.discard(sandbox_id)
            if sandbox_id in self._sandboxes:
                self._left.add(sandbox_id)
            del self._removing[sandbox_id]
            done.set()

    def left(self) -> list[str]:
        """
        Ids of sandboxes whose removal was begun and has not succeeded.
        """
        return sorted(self._left)

    async def cut(self, sandbox_id: str, match: Callable[[SocketInfo], bool]) -> int:
        """
        Destroy the sandbox's sockets that match; returns how many.
        """
        sandbox = self._known(sandbox_id)
        return await asyncio.to_thread(cut_sockets, network.namespace_path(sandbox.netns), match)

    async def sockets(self, sandbox_id: str) -> list[SocketInfo]:
        """
        The TCP and UDP sockets of a sandbox that have a peer.
        """
        return await asyncio.to_thread(list_sockets, network.namespace_path(self._known(sandbox_id).netns))

    async def aclose(self, *, remove: bool) -> None:
        """
        Stop publishing; with `remove`, and when no sandbox is left, bridge, ring and parent too.
        """
        await self._publisher.aclose()
        if self._log is not None:
            self._log.close()
            self._log = None
        for started in self._processes.values():
            if started.returncode is None:
                # They outlive us on purpose; without this the interpreter warns about them.
                started.returncode = 0
        self._processes.clear()
        if remove and not self._sandboxes:
            await self.ring.remove()
            await network.remove_bridge(self._bridge)
            self._restore_forwarding()
            if self._limiter is not None:
                self._limiter.remove_parents()
            try:
                cgroups.remove(self.parent_cgroup)
            except OSError as error:
                log.warning("engines_parent_cgroup_kept", error=str(error))

    # -- inner --------------------------------------------------------------------------------

    def _lay_out(self, sandbox: Sandbox) -> None:
        spec, etc, home = sandbox.spec, sandbox.directory / "etc", sandbox.directory / "home"
        try:
            etc.mkdir(parents=True)
            # Passed through by the agent's user on the way to what is mounted, never listed.
            sandbox.directory.chmod(0o711)
            home.mkdir(mode=0o700)
            os.chown(home, spec.uid, spec.gid)
            for name, text in etc_files(spec, sandbox.address, self.gateway).items():
                (etc / name).write_text(text)
                (etc / name).chmod(0o644)
        except OSError as error:
            raise Unavailable(f"cannot write {sandbox.directory}: {error.strerror}") from error

    def _known(self, sandbox_id: str) -> Sandbox:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFound(f"no sandbox {sandbox_id[:12]}")
        return sandbox

    def _end_of(self, sandbox: Sandbox) -> int:
        """The exit code of a process that is gone, kept from now on."""
        known = self._endings.get(sandbox.id)
        if known is None:
            started = self._processes.get(sandbox.id)
            known = process.exit_code(sandbox, started.poll() if started is not None else None)
            self._endings.put(sandbox.id, known)
        return known

    async def _stop(self, sandbox: Sandbox, grace_s: float) -> None:
        # The stages join the cgroup by themselves: an empty one says nothing while they live.
        if process.runs(sandbox):
            if grace_s > 0:
                try:
                    async with asyncio.timeout(grace_s):
                        process.send(await process.command_pid(sandbox), signal.SIGTERM)
                        await process.wait_gone(sandbox.pid, sandbox.started)
                except (TimeoutError, NotFound):
                    log.info("engines_grace_over", id=sandbox.id)
            process.kill_init(sandbox)
            try:
                # bwrap tells the exit code when its process 1 is gone; only then it may be killed.
                async with asyncio.timeout(TELL_LIMIT_S):
                    await process.wait_gone(sandbox.pid, sandbox.started)
            except TimeoutError:
                process.kill_stage(sandbox)
        await cgroups.kill(sandbox.cgroup_path, KILL_LIMIT_S)

    async def _take_apart(self, sandbox: Sandbox) -> None:
        # Of one whose command never began there is no end to tell: whoever asked for it may ask again.
        if sandbox.id in self._processes or process.began(sandbox):
            self._end_of(sandbox)
        await self._publisher.withdraw(sandbox.id)
        if self._with_ring:
            await self.ring.unpin(sandbox.interface, sandbox.address)
        await network.remove_sandbox(sandbox.netns, sandbox.interface, (sandbox.address, self._bridge))
        await cgroups.clear(sandbox.cgroup_path, KILL_LIMIT_S)
        if self._limiter is not None:
            await self._limiter.clear(sandbox.cgroup_path.name, KILL_LIMIT_S)
        self._owners = {index: owner for index, owner in self._owners.items() if owner != sandbox.id}
        await asyncio.to_thread(discard, sandbox.directory)

    async def _sweep(self) -> None:
        """Remove namespaces, interfaces and cgroups that belong to no record: halves of a killed create."""
        known_ns = {sandbox.netns for sandbox in self._sandboxes.values()}
        known_if = {sandbox.interface for sandbox in self._sandboxes.values()}
        namespaces, interfaces = await network.leftovers(PREFIX, self._bridge)
        for name in interfaces:
            # The prefix is that of this bridge: nobody else's have it.
            if name not in known_if:
                await network.remove_sandbox("", name)
        for child in self.parent_cgroup.iterdir():
            if child.is_dir() and child.name not in known_ns and child.name.startswith(f"{PREFIX}-"):
                # In a cgroup of ours without a record: nobody waits for it, nobody could enrol it.
                await cgroups.kill(child, KILL_LIMIT_S)
                if child.name in namespaces:
                    await network.remove_sandbox(child.name, "")
                await cgroups.clear(child, KILL_LIMIT_S)  # last: it is what says that the namespace is ours

    def _own(self, sandbox: Sandbox) -> None:
        try:
            self._owners[socket.if_nametoindex(sandbox.interface)] = sandbox.id
        except OSError as error:
            log.warning("engines_interface_missing", id=sandbox.id, interface=sandbox.interface, error=str(error))

    def _watch_drops(self) -> None:
        if self._on_drop is None:
            return
        ring_log = RingLog(self.ring.group, lambda index: self._owners.get(index, ""), self._on_drop)
        try:
            ring_log.open()
        except Unavailable as error:
            # Drops go on without being told: reporting never blocks enforcing (I12).
            log.warning("host_ring_log_unavailable", cause=str(error))
            return
        self._log = ring_log

    async def _publish_again(self, sandbox: Sandbox) -> None:
        try:
            sandbox.publish = await self._publisher.publish(sandbox.id, sandbox.address, sandbox.publish)
        except Conflict as error:
            log.warning("engines_publish_lost", id=sandbox.id, error=str(error))

    def _forwarded_before(self) -> bool:
        """Whether the host forwarded before the first of us; remembered, for a later start finds it on."""
        mark = self._state.parent / FORWARDING_MARK
        if mark.exists():
            return mark.read_text().strip() == "1"
        before = forwarding()
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text("1" if before else "0")
        except OSError as error:
            mark.unlink(missing_ok=True)  # half of it would say something else
            raise Unavailable(
                f"cannot write {mark}: {error.strerror}", hint="is the disk full or read-only?"
            ) from error
        return before

    def _restore_forwarding(self) -> None:
        mark = self._state.parent / FORWARDING_MARK
        if mark.exists():
            if mark.read_text().strip() == "0":
                set_forwarding(on=False)
            mark.unlink()
