"""
The host engine's front: create, run, wait, signal, remove, adopt, sweep.

A sandbox is made in two steps so that enrolment fits between: `create` gives it an address, a
network namespace and an empty cgroup; `run` starts its first process. Records on disk let the
next start adopt what runs and sweep what is dead.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson
import structlog

from clawker_cp.engines.base import Publish, Sandbox, SandboxSpec
from clawker_cp.engines.host import bubble, cgroups, network, process
from clawker_cp.engines.host.publish import Publisher
from clawker_cp.engines.host.ring import HostRing
from clawker_cp.engines.host.sockets import SocketInfo, cut_sockets
from clawker_cp.errors import ClawkerError, Conflict, InvalidInput, NotFound

log = structlog.get_logger()

PREFIX = "clawker"
KILL_LIMIT_S = 5.0
ENDED_KEPT = 1024
RECORD = "record.json"


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
    ) -> None:
        self._state = state_dir / "sandboxes"
        self._bridge = bridge
        self.subnet = subnet
        self.gateway = network.gateway_of(subnet)
        self._parent_name = cgroup_parent
        self._masked = tuple(masked)
        self._ca_dir = ca_dir
        self.ring = HostRing(bridge, subnet, self.gateway)
        self._publisher = Publisher()
        self._sandboxes: dict[str, Sandbox] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: dict[str, int] = {}
        self._creating = asyncio.Lock()
        self._removing: dict[str, asyncio.Event] = {}

    @property
    def parent_cgroup(self) -> Path:
        return cgroups.find_cgroup2() / self._parent_name

    async def start(self) -> None:
        """
        Make what all sandboxes share, adopt those that still run, and sweep dead remains.
        """
        cgroups.ensure(self.parent_cgroup)
        await network.ensure_bridge(self._bridge, self.subnet)
        self._state.mkdir(parents=True, exist_ok=True, mode=0o711)
        dead = []
        for directory in sorted(self._state.iterdir()):
            sandbox = self._read(directory)
            if sandbox is None:
                shutil.rmtree(directory, ignore_errors=True)
            elif cgroups.is_populated(sandbox.cgroup_path):
                self._sandboxes[sandbox.id] = sandbox
            else:
                dead.append(sandbox)
        living = [(sandbox.interface, sandbox.address) for sandbox in self._sandboxes.values()]
        await self.ring.install(living)
        for sandbox in dead:
            self._keep_code(sandbox.id, process.exit_code(sandbox, None))
            await self._take_apart(sandbox)
        await self._sweep()

    def living(self) -> list[Sandbox]:
        """
        Every sandbox that exists now.
        """
        return list(self._sandboxes.values())

    def exit_code(self, sandbox_id: str) -> int | None:
        """
        The exit code of a sandbox that has ended, as long as it is remembered.
        """
        return self._ended.get(sandbox_id)

    async def host_addresses(self) -> list[str]:
        return await network.host_addresses()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """
        Make a sandbox in which nothing runs. All or nothing.

        Raises `InvalidInput` for a spec that cannot be, `Conflict` for a name in use.
        """
        self._check(spec)
        async with self._creating:
            for other in self._sandboxes.values():
                if (other.project, other.agent) == (spec.project, spec.agent):
                    raise Conflict(f"--agent: {spec.agent} of project {spec.project or '(none)'} runs already")
            sandbox_id = secrets.token_hex(32)
            short = sandbox_id[:8]
            cgroup_path = self.parent_cgroup / f"{PREFIX}-{sandbox_id[:12]}"
            sandbox = Sandbox(
                id=sandbox_id,
                spec=spec,
                address=network.free_address(self.subnet, [s.address for s in self._sandboxes.values()]),
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
            await network.add_sandbox(sandbox.netns, sandbox.interface, self._bridge, sandbox.address, self.subnet)
            await self.ring.pin(sandbox.interface, sandbox.address)
            sandbox.publish = await self._publisher.publish(sandbox.id, sandbox.address, spec.publish)
            self._write(sandbox)
        except BaseException:
            await asyncio.shield(self.remove(sandbox_id, force=True, grace_s=0))
            raise
        return sandbox

    async def run(self, sandbox_id: str, streams: tuple[int, int, int]) -> None:
        """
        Start the command on the given streams (which stay the caller's).
        """
        sandbox = self._known(sandbox_id)
        started = await asyncio.to_thread(
            process.launch, sandbox, streams, masked=self._masked, ca_dir=self._ca_dir
        )
        self._processes[sandbox_id] = started
        sandbox.pid = started.pid
        self._write(sandbox)

    async def wait(self, sandbox_id: str) -> int:
        """
        Wait for the command's end and return its exit code; at once for one that has ended.
        """
        if sandbox_id in self._ended:
            return self._ended[sandbox_id]
        sandbox = self._known(sandbox_id)
        await process.wait_gone(sandbox.pid)
        started = self._processes.get(sandbox_id)
        code = process.exit_code(sandbox, started.poll() if started is not None else None)
        self._keep_code(sandbox_id, code)
        return code

    async def signal(self, sandbox_id: str, signo: int) -> None:
        """
        Deliver a signal to the command, not to what it started.
        """
        process.send(await process.command_pid(self._known(sandbox_id)), signo)

    async def remove(self, sandbox_id: str, *, force: bool, grace_s: float) -> None:
        """
        End a sandbox and take everything of it away; one that is gone is fine.

        Raises `Conflict` AGENT_RUNNING for a running one without `force`.
        """
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            return
        if sandbox_id in self._removing:
            await self._removing[sandbox_id].wait()
            return
        if cgroups.is_populated(sandbox.cgroup_path) and not force:
            raise Conflict(f"sandbox {sandbox_id[:12]} is running", code="AGENT_RUNNING", hint="remove it with force")
        done = self._removing[sandbox_id] = asyncio.Event()
        try:
            await self._stop(sandbox, grace_s)
            await self._take_apart(sandbox)
        finally:
            self._sandboxes.pop(sandbox_id, None)
            started = self._processes.pop(sandbox_id, None)
            if started is not None:
                started.poll()
            del self._removing[sandbox_id]
            done.set()

    async def cut(self, sandbox_id: str, match: Callable[[SocketInfo], bool]) -> int:
        """
        Destroy the sandbox's sockets that match; returns how many.
        """
        sandbox = self._known(sandbox_id)
        return await asyncio.to_thread(cut_sockets, sandbox.netns, match)

    async def aclose(self, *, remove: bool) -> None:
        """
        Stop publishing; with `remove`, and when no sandbox is left, bridge, ring and parent too.
        """
        await self._publisher.aclose()
        if remove and not self._sandboxes:
            await self.ring.remove()
            await network.remove_bridge(self._bridge)
            try:
                cgroups.remove(self.parent_cgroup)
            except OSError as error:
                log.warning("engines_parent_cgroup_kept", error=str(error))

    # -- inner --------------------------------------------------------------------------------

    def _check(self, spec: SandboxSpec) -> None:
        bubble.check_paths(spec.workdir, self._masked)
        if not spec.argv:
            raise InvalidInput("no command to run", hint="write it after --")
        if spec.uid == 0 and not spec.allow_root:
            raise InvalidInput("the command would run as root", hint="add --allow-root if that is meant")
        if not Path(spec.workdir).is_dir():
            raise InvalidInput(f"--workdir: {spec.workdir} is not a directory")

    def _lay_out(self, sandbox: Sandbox) -> None:
        etc = sandbox.directory / "etc"
        etc.mkdir(parents=True)
        sandbox.directory.chmod(0o711)
        home = sandbox.directory / "home"
        home.mkdir()
        os.chown(home, sandbox.spec.uid, sandbox.spec.gid)
        uid, gid = sandbox.spec.uid, sandbox.spec.gid
        users = "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        groups = "root:x:0:\nnogroup:x:65534:\n"
        if uid != 0:
            users += f"clawker:x:{uid}:{gid}:clawker:{bubble.HOME}:/bin/bash\n"
        if gid != 0:
            groups += f"clawker:x:{gid}:\n"
        hostname = sandbox.agent[:63]
        (etc / "passwd").write_text(users)
        (etc / "group").write_text(groups)
        (etc / "resolv.conf").write_text(f"nameserver {self.gateway}\noptions timeout:5 attempts:2\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{sandbox.address} {hostname}\n")
        (etc / "hostname").write_text(f"{hostname}\n")

    def _write(self, sandbox: Sandbox) -> None:
        record = {
            "id": sandbox.id,
            "spec": sandbox.spec.as_mapping(),
            "address": sandbox.address,
            "netns": sandbox.netns,
            "interface": sandbox.interface,
            "cgroup_path": str(sandbox.cgroup_path),
            "cgroup_id": sandbox.cgroup_id,
            "publish": [{"host_port": p.host_port, "port": p.port} for p in sandbox.publish],
            "pid": sandbox.pid,
        }
        temporary = sandbox.directory / f".clawker-{RECORD}.tmp"
        temporary.write_bytes(orjson.dumps(record))
        temporary.chmod(0o600)
        temporary.replace(sandbox.directory / RECORD)

    def _read(self, directory: Path) -> Sandbox | None:
        try:
            raw = orjson.loads((directory / RECORD).read_bytes())
            return Sandbox(
                id=raw["id"],
                spec=SandboxSpec.from_mapping(raw["spec"]),
                address=raw["address"],
                netns=raw["netns"],
                interface=raw["interface"],
                cgroup_path=Path(raw["cgroup_path"]),
                cgroup_id=int(raw["cgroup_id"]),
                directory=directory,
                publish=tuple(Publish(p["host_port"], p["port"]) for p in raw["publish"]),
                pid=int(raw["pid"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("engines_record_skipped", directory=str(directory), error=str(error))
            return None

    def _known(self, sandbox_id: str) -> Sandbox:
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFound(f"no sandbox {sandbox_id[:12]}")
        return sandbox

    def _keep_code(self, sandbox_id: str, code: int) -> None:
        self._ended[sandbox_id] = code
        while len(self._ended) > ENDED_KEPT:
            del self._ended[next(iter(self._ended))]

    async def _stop(self, sandbox: Sandbox, grace_s: float) -> None:
        if grace_s > 0 and cgroups.is_populated(sandbox.cgroup_path):
            try:
                process.send(await process.command_pid(sandbox), 15)
                async with asyncio.timeout(grace_s):
                    await process.wait_gone(sandbox.pid)
            except (TimeoutError, ClawkerError):
                log.info("engines_grace_over", id=sandbox.id[:12])
        await cgroups.kill(sandbox.cgroup_path, KILL_LIMIT_S)

    async def _take_apart(self, sandbox: Sandbox) -> None:
        await self._publisher.withdraw(sandbox.id)
        await self.ring.unpin(sandbox.interface, sandbox.address)
        await network.remove_sandbox(sandbox.netns, sandbox.interface)
        cgroups.remove(sandbox.cgroup_path)
        shutil.rmtree(sandbox.directory, ignore_errors=True)

    async def _sweep(self) -> None:
        """Remove namespaces, interfaces and cgroups that belong to no record: halves of a killed create."""
        known_ns = {sandbox.netns for sandbox in self._sandboxes.values()}
        known_if = {sandbox.interface for sandbox in self._sandboxes.values()}
        on_bridge = {
            link["ifname"]
            for link in json.loads(await network.run("ip", "-j", "link", "show", "master", self._bridge) or "[]")
        }
        namespaces, interfaces = await network.leftovers(PREFIX, self._bridge)
        for name in namespaces:
            cgroup = self.parent_cgroup / name
            if name not in known_ns and cgroup.exists() and not cgroups.is_populated(cgroup):
                await network.remove_sandbox(name, "none")
        for name in interfaces:
            if name in on_bridge and name not in known_if:
                await network.run("ip", "link", "del", name, check=False)
        for child in self.parent_cgroup.iterdir():
            if child.is_dir() and child.name not in known_ns and not cgroups.is_populated(child):
                cgroups.remove(child)
