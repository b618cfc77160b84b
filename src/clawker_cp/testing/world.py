"""
The outside world and a machine in front of it, for tests, benchmarks and the tour.

`HostNamespace` plays the machine: network, mounts and bpffs of its own and cgroups of its own
name, so that nothing of it touches this one. `World` plays the Internet: real DNS, HTTP, TLS, TCP,
UDP and SSH servers on addresses that documents use. Both vanish with the process that made them.

    async with HostNamespace() as host, World(host) as world:
        done = await host.run(["curl", "-s", "http://api.example.com/x"])
        assert [c["requests"][0]["target"] for c in await world.connections()] == ["/x"]

Needs root, and ip, nsenter, unshare, setpriv. Who asks for "no byte arrived" compares `packets()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from clawker_cp.testing import world_names as names
from clawker_cp.testing.removal import Removed

START_S = 30.0
STOP_S = 10.0
_DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")

# $1 the resolv.conf to show
_HOLD = """
set -e
resolv=$(readlink -f /etc/resolv.conf)
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p "$(dirname "$resolv")"; [ -e "$resolv" ] || : > "$resolv"
mount --bind "$1" "$resolv"
mkdir -p /sys/fs/bpf; mount -t bpf bpf /sys/fs/bpf
ip link set lo up
ip route add unreachable default metric 4278198272
ip -6 route add unreachable default dev lo metric 4278198272
echo 1 > /proc/sys/net/ipv4/ip_forward
echo ready
exec sleep infinity
"""
_ENTER = 'echo $$ > "$1"; pid=$2; wd=$3; which=$4; shift 4; exec nsenter -t "$pid" $which --wdns="$wd" -- "$@"'


@dataclass(frozen=True, slots=True)
class Finished:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def cgroup2_mount() -> Path:
    """
    Where the unified hierarchy is, hybrid hosts included. Raises `RuntimeError` without one.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            return Path(fields.split()[4])
    raise RuntimeError("no cgroup2 is mounted on this machine")


def _populated(cgroup: Path) -> bool:
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except OSError:
        return False


def new_prefix() -> str:
    """
    A name that no other test uses.
    """
    return f"ckw{os.getpid()}-{secrets.token_hex(2)}"


class HostNamespace(Removed):
    """
    A machine of the test's own: fresh network namespace, private /run and bpffs, no route out.

    cgroup2 is the machine's: BPF programs count depth from its real root, which a cgroup namespace hides.
    With `own_pids` its processes are its own too, so that /proc/1 is in its network namespace, as on a
    machine that runs a control plane as container. What is started here lives in `cgroup`, sandboxes of
    `environment` in `agents`; leaving the context kills every process in both and removes them. Use `run`
    and `popen`.
    """

    def __init__(self, prefix: str | None = None, *, own_pids: bool = False) -> None:
        self.prefix = prefix or new_prefix()
        self._own_pids = own_pids
        self.directory = Path()
        self.mount = Path()
        self.cgroup = Path()
        self.agents = Path()
        self.pid = 0
        self._holder: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self.mount = cgroup2_mount()
        self.cgroup = self.mount / self.prefix
        self.agents = self.mount / f"{self.prefix}-agents"
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-host-"))
        # The owner of a test's working directories has to reach them as an ordinary user as well.
        self.directory.chmod(0o755)
        self.cgroup.mkdir()
        async with self._or_removed():
            resolv = self.directory / "resolv.conf"
            resolv.write_text(f"nameserver {names.DNS_SERVER}\n")
            enter = 'echo $$ > "$1/cgroup.procs"; shift; exec "$@"'
            argv = ["sh", "-c", enter, "enter", str(self.cgroup), *_DIE_WITH_US]
            argv += ["unshare", "--net", "--mount", "--propagation", "private"]
            if self._own_pids:
                argv += ["--pid", "--fork", "--kill-child", "--mount-proc"]
            argv += ["sh", "-c", _HOLD, "hold", str(resolv)]
            self._holder = await _start(argv)
            self.pid = self._holder.pid
            if self._own_pids:
                self.pid = int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()[0])
        return self

    @property
    def netns(self) -> Path:
        """The network namespace, for tools that take a path."""
        return Path(f"/proc/{self.pid}/ns/net")

    def environment(self, world: World | None = None) -> dict[str, str]:
        """
        Variables under which `clawker-cp` keeps its files in this machine's directory and asks the world's DNS.
        """
        made = {f"CLAWKER_{kind}_DIR": str(self.directory / kind.lower()) for kind in _KINDS}
        made["CLAWKER_CP_HOST__CGROUP_PARENT"] = self.agents.name
        # A server that waits for its test's next step is not to end meanwhile.
        made["CLAWKER_CP_DRAIN__TO_ZERO"] = "false"
        made["CLAWKER_CP_DNS__FORWARDERS"] = names.DNS_SERVER
        if world is not None:
            made["CLAWKER_CP_ENVOY__TRUSTED_CA"] = str(world.ca)
        return made

    def command(self, argv: Sequence[str], cwd: str = "/") -> list[str]:
        """The argument list that runs `argv` inside; for callers that start processes themselves."""
        procs = str(self.cgroup / "cgroup.procs")
        which = "-n -m -p" if self._own_pids else "-n -m"
        return ["sh", "-c", _ENTER, "enter", procs, str(self.pid), cwd, which, *argv]

    def popen(self, argv: Sequence[str], *, cwd: str = "/", **options: Any) -> subprocess.Popen[Any]:
        """Start a process inside; the caller ends it, or leaving the context does."""
        return subprocess.Popen(self.command(argv, cwd), **options)

    async def start(
        self, argv: Sequence[str], *, cwd: str = "/", env: Mapping[str, str] | None = None, **options: Any
    ) -> asyncio.subprocess.Process:
        """As `popen`, with asyncio's streams."""
        return await asyncio.create_subprocess_exec(
            *self.command(argv, cwd), env={**os.environ, **(env or {})}, **options
        )

    async def run(
        self,
        argv: Sequence[str],
        *,
        cwd: str = "/",
        env: Mapping[str, str] | None = None,
        data: bytes | None = None,
        timeout_s: float = 30.0,
    ) -> Finished:
        """Run a command inside to its end; raises `TimeoutError` after killing it."""
        pipe = asyncio.subprocess.PIPE
        stdin = pipe if data is not None else asyncio.subprocess.DEVNULL
        process = await self.start(argv, cwd=cwd, env=env, stdin=stdin, stdout=pipe, stderr=pipe)
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate(data)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return Finished(process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace"))

    async def _remove(self) -> None:
        for cgroup in (self.agents, self.cgroup):
            with contextlib.suppress(OSError):
                (cgroup / "cgroup.kill").write_text("1")
        if self._holder is not None:
            await _end(self._holder)
        for cgroup in (self.agents, self.cgroup):
            async with asyncio.timeout(STOP_S):
                while _populated(cgroup):
                    await asyncio.sleep(0.005)
            for directory, _, _ in os.walk(cgroup, topdown=False):
                Path(directory).rmdir()
        shutil.rmtree(self.directory, ignore_errors=True)


_KINDS = ("CONFIG", "DATA", "STATE", "CACHE")


class World(Removed):
    """
    The outside world: owns the test ranges and answers on all of their addresses (`world_names`).

    `host` machines are connected at start, others with `connect`. `ca` is the certificate that its
    HTTPS servers descend from. All lists are since the last `reset`.
    """

    def __init__(self, *hosts: HostNamespace, prefix: str | None = None) -> None:
        self.prefix = prefix or new_prefix()
        self.directory = Path()
        self.pid = 0
        self._hosts = hosts
        self._links = 0
        self._process: asyncio.subprocess.Process | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-world-"))
        self.directory.chmod(0o755)
        async with self._or_removed():
            argv = [*_DIE_WITH_US, "unshare", "--net", "--mount", "--propagation", "private"]
            argv += [sys.executable, "-m", "clawker_cp.testing.world_server", str(self.directory)]
            self._process = await _start(argv)
            self.pid = self._process.pid
            control = str(self.directory / "control.sock")
            self._streams = await asyncio.open_unix_connection(control, limit=names.CONTROL_LINE_BYTES)
            for host in self._hosts:
                await self.connect(host.pid)
        return self

    @property
    def dns(self) -> str:
        """The address of its name server."""
        return names.DNS_SERVER

    @property
    def ca(self) -> Path:
        return self.directory / "ca.pem"

    async def connect(self, pid: int, interface: str = "wan0") -> str:
        """
        Give the network namespace of `pid` a link to the world and routes to its ranges.

        Returns the address at that end. The peer has no route back to anything else.
        """
        number = self._links
        self._links += 1
        here, there = f"192.0.2.{4 * number + 2}", f"192.0.2.{4 * number + 1}"
        here6, there6 = f"fd7c:1a3e:c4:{number:x}::2", f"fd7c:1a3e:c4:{number:x}::1"
        await _ip(
            self.pid,
            f"link add host{number} type veth peer name {interface} netns {pid}",
            f"addr add {here}/30 dev host{number}",
            f"addr add {here6}/64 dev host{number} nodad",
            f"link set host{number} up",
        )
        commands = [
            f"addr add {there}/30 dev {interface}",
            f"addr add {there6}/64 dev {interface} nodad",
            f"link set {interface} up",
        ]
        commands += [f"route add {network} via {here}" for network in names.RANGES_V4]
        commands += [f"route add {network} via {here6}" for network in names.RANGES_V6]
        await _ip(pid, *commands)
        return there

    async def connections(self, **wanted: Any) -> list[dict[str, Any]]:
        """
        What servers accepted: TCP connections and UDP datagrams (DNS datagrams are `queries`).

        Keys: proto, service, src, sport, dst, dport, sni, alpn, bytes_in, payload (first 4 KB, as
        Latin-1), requests, closed. `wanted` keeps those whose fields are equal.
        """
        return _matching(await self._ask("connections"), wanted)

    async def packets(self, **wanted: Any) -> list[dict[str, Any]]:
        """
        Every flow of which a packet came in: proto, src, sport, dst, dport, packets, bytes.

        Pure acknowledgements and link upkeep are left out. Empty means that nothing arrived at all.
        """
        return _matching(await self._ask("packets"), wanted)

    async def queries(self, **wanted: Any) -> list[dict[str, Any]]:
        """The DNS questions that came in: name, type, transport, src, dst, options (EDNS codes)."""
        return _matching(await self._ask("queries"), wanted)

    async def reset(self) -> None:
        """Forget all of the above, and every change of names and behaviour."""
        await self._ask("reset")

    async def behave(self, subject: str, kind: str, delay_ms: int = 0) -> None:
        """
        Make a DNS server address, a name, or "*" behave as one of `world_dns.KINDS`.
        """
        await self._ask("behave", subject=subject, kind=kind, delay_ms=delay_ms)

    async def zone(self, name: str, types: Mapping[str, Sequence[str]]) -> None:
        """Replace the records of one name, for example `{"A": ["198.51.100.77"]}`."""
        await self._ask("zone", name=name, types={kind: list(data) for kind, data in types.items()})

    async def ttl(self, seconds: int) -> None:
        """Set the time to live of all answers from now on."""
        await self._ask("ttl", seconds=seconds)

    async def _ask(self, op: str, **fields: Any) -> Any:
        if self._streams is None:
            raise RuntimeError("the world is not running: use it as an async context manager")
        reader, writer = self._streams
        async with self._turn, asyncio.timeout(START_S):
            writer.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            await writer.drain()
            line = await reader.readline()
        reply = json.loads(line)
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply["ok"]

    async def _remove(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            with contextlib.suppress(OSError):
                await self._streams[1].wait_closed()
        if self._process is not None:
            await _end(self._process)
        shutil.rmtree(self.directory, ignore_errors=True)


def _matching(records: list[dict[str, Any]], wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [record for record in records if all(record[key] == value for key, value in wanted.items())]


async def _start(argv: Sequence[str]) -> asyncio.subprocess.Process:
    """Start a process and wait for its line `ready`; raises `RuntimeError` with what it wrote instead."""
    pipe = asyncio.subprocess.PIPE
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=errors
        )
        line = b""
        try:
            async with asyncio.timeout(START_S):
                line = await process.stdout.readline() if process.stdout else b""
        finally:
            if line != b"ready\n":
                await _end(process)
        if line != b"ready\n":
            errors.seek(0)
            raise RuntimeError(f"{argv[-2]} did not start: {errors.read().decode(errors='replace')}")
    return process


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        # Not process.kill(): it may reap a process that just died behind the back of asyncio's watcher.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(STOP_S):
        await process.wait()


async def _ip(pid: int, *commands: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "nsenter", "-t", str(pid), "-n", "ip", "-batch", "-",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate("\n".join(commands).encode())
    if process.returncode:
        raise RuntimeError(f"ip refused: {out.decode(errors='replace')}")
