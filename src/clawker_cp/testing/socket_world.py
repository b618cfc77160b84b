"""
Agents with real sockets behind the real programs, for tests of the kernel side alone.

`SocketWorld` makes a parent cgroup, attaches everything to it, and lays two network namespaces
side by side: the agents' and an outside that owns the addresses of documentation and plays the
gateway (listeners, DNS gate, control plane). No sandbox, no Envoy. All of it goes on exit.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from clawker_cp import accel
from clawker_cp._fast import layout
from clawker_cp.ebpf.config import AgentConfig, NameRow, mapped
from clawker_cp.ebpf.manager import Manager
from clawker_cp.firewall.plan import CidrRow, ProxyPort, RouteAction, RouteRow, Span
from clawker_cp.testing.bpf_abi import REASONS, VERDICTS
from clawker_cp.testing.world import cgroup2_mount

GATEWAY = "10.231.200.1"
AGENT = "10.231.200.5"
SIBLING = "10.231.200.6"
GATEWAY6 = "2001:db8:c::1"
AGENT6 = "2001:db8:c::5"
TARGET = "203.0.113.7"
OTHER = "198.51.100.7"
TARGET6 = "2001:db8::7"
RESERVED = ("10.231.200.0/24", "2001:db8:c::/64")
FOREVER_S = 600.0
CONFIG = AgentConfig(policy=1, proxy_addr=GATEWAY, dns_addr=GATEWAY, cp_addr=GATEWAY, host_addr=GATEWAY)

_OUTSIDE = f"""
ip link set lo up
ip link add veth0 type veth peer name eth0 netns $1
ip link set veth0 up
ip addr add {GATEWAY}/24 dev veth0
ip addr add {GATEWAY6}/64 dev veth0 nodad
for a in {TARGET} {OTHER}; do ip addr add $a/32 dev lo; done
ip addr add {TARGET6}/128 dev lo nodad
"""
_AGENTS = f"""
ip link set lo up
ip link set eth0 up
ip addr add {AGENT}/24 dev eth0
ip addr add {SIBLING}/24 dev eth0
ip addr add {AGENT6}/64 dev eth0 nodad
ip route add default via {GATEWAY}
ip -6 route add default via {GATEWAY6}
"""
_ENTER = 'echo $$ > "$1/cgroup.procs" && shift && exec nsenter --net="/proc/$1/ns/net" -- "$2" -m "$3" "$4"'
_ACTOR = "clawker_cp.testing.socket_actor"


class Refused(Exception):
    """A socket call failed; `name` is the errno's, or TIMEOUT."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Actor:
    """A process in a cgroup and a network namespace; calls become socket calls over there."""

    def __init__(self, cgroup: Path, netns_pid: int, channel: socket.socket | None = None) -> None:
        self.cgroup = cgroup
        passed = () if channel is None else (channel.fileno(),)
        self._process = subprocess.Popen(
            [
                "sh",
                "-c",
                _ENTER,
                "actor",
                str(cgroup),
                str(netns_pid),
                sys.executable,
                _ACTOR,
                *map(str, passed or [-1]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=passed,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __call__(self, action: str, *arguments: object) -> Any:
        """Do something; raises `Refused` with the errno's name."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([action, arguments]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "DEAD"}')
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["is"]

    def error(self, action: str, *arguments: object) -> str:
        """The name of the errno something fails with, or "" if it does not."""
        try:
            self(action, *arguments)
        except Refused as refused:
            return refused.name
        return ""

    def tcp(self, family: int = socket.AF_INET) -> int:
        return int(self("make", family, socket.SOCK_STREAM))

    def udp(self, family: int = socket.AF_INET) -> int:
        return int(self("make", family, socket.SOCK_DGRAM))

    def dial(self, addr: str, port: int, said: str = "hello") -> str:
        """Connect by TCP, say something, and return the answer."""
        handle = self.tcp(socket.AF_INET6 if ":" in addr else socket.AF_INET)
        self("connect", handle, addr, port)
        self("send", handle, said)
        return str(self("receive", handle)[0])

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class SocketWorld:
    """
    The attached programs, the outside, and agents as they are asked for.

    Rules are given as rows and take effect with `apply`. `decisions()` are the records since the
    last look, as "hook verdict reason" strings with what they say beside.
    """

    def __init__(self) -> None:
        self.prefix = f"ckb{os.getpid()}-{secrets.token_hex(2)}"
        self.parent = cgroup2_mount() / self.prefix
        self.manager = Manager(Path("/sys/fs/bpf") / self.prefix, max_agents=64)
        self.outside: Actor
        self.agents_ns = 0
        self._outside_cgroup = cgroup2_mount() / f"{self.prefix}-outside"
        self._stack = contextlib.ExitStack()
        self._agents: list[Actor] = []
        self._made: list[Path] = []
        self._engine: list[Path] = []
        self._count = 0
        self.routes: set[RouteRow] = set()
        self.cidrs: list[CidrRow] = []
        self.ports: set[ProxyPort] = set()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for cgroup in (self.parent, self._outside_cgroup):
                cgroup.mkdir()
                stack.callback(remove_cgroup, cgroup)
            outside_ns, self.agents_ns = (stack.enter_context(_namespace()) for _ in range(2))
            _shell(_OUTSIDE, outside_ns, str(self.agents_ns))
            _shell(_AGENTS, self.agents_ns)
            stack.callback(self.manager.flush, force=True)
            self.manager.load(self.parent)
            self.outside = Actor(self._outside_cgroup, outside_ns)
            stack.callback(self.outside.close)
            stack.callback(self._remove_engine)
            stack.callback(self.remove_agents)
            for kind, ports in (("tcp", (53, 443, 7444, 10000, 10001, 10002)), ("udp", (53, 10000, 11001, 11002))):
                for port in ports:
                    self.outside("serve", kind, GATEWAY, port)
            for addr in (TARGET, OTHER, TARGET6):
                for kind in ("tcp", "udp"):
                    for port in (22, 53, 443, 5000):
                        self.outside("serve", kind, addr, port)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- agents

    def cgroup(self, name: str = "") -> Path:
        """A cgroup below the agents' parent; nobody is enrolled."""
        self._count += 1
        return self.inside(self.parent, name or f"agent{self._count}")

    def inside(self, cgroup: Path, name: str) -> Path:
        """A cgroup, or some, inside another."""
        made = cgroup
        for part in name.split("/"):
            made = made / part
            if not made.exists():
                made.mkdir()
                self._made.append(made)
        return made

    def container(self, depth: int = 2) -> Path:
        """A cgroup so many levels below the root and outside the agents' parent, as an engine makes them."""
        self._count += 1
        made = cgroup2_mount()
        for level in range(1, depth + 1):
            last = level == depth
            made = made / (f"{self.prefix}-box{self._count}" if last else f"{self.prefix}-engine{level}")
            if not made.exists():
                made.mkdir()
                (self._made if last else self._engine).append(made)
        return made

    def actor(self, cgroup: Path, channel: socket.socket | None = None) -> Actor:
        """A process in a cgroup, in the agents' network."""
        made = Actor(cgroup, self.agents_ns, channel)
        self._agents.append(made)
        return made

    def agent(self, config: AgentConfig = CONFIG, channel: socket.socket | None = None) -> Actor:
        """An enrolled agent with one process."""
        cgroup = self.cgroup()
        self.manager.enroll(cgroup_id(cgroup), config)
        return self.actor(cgroup, channel)

    def bystander(self, channel: socket.socket | None = None) -> Actor:
        """A process in the agents' network that is no agent: outside their parent cgroup."""
        made = Actor(self._outside_cgroup, self.agents_ns, channel)
        self._agents.append(made)
        return made

    @contextlib.contextmanager
    def unenforced(self) -> Iterator[None]:
        """The time before anything was enforced: whoever is not enrolled passes."""
        self.switch(enforce=False)
        try:
            yield
        finally:
            self.switch(enforce=True)

    def switch(self, *, enforce: bool = True, budget: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Write the switches as the manager has no verb for yet; 0 is a budget's default."""
        control = self.manager._maps["control"]
        row = layout.unpack_control(control.get(bytes(4)) or b"")
        control.put(bytes(4), layout.pack_control(row["generation"], int(enforce), budget, row["wakeup"]))

    def configure(self, agent: Actor, **changes: Any) -> None:
        """Change an agent's row."""
        number = cgroup_id(agent.cgroup)
        self.manager.enroll(number, replace(self.manager.agents()[number], **changes))

    def remove_agents(self) -> None:
        for agent in self._agents:
            agent.close()
        self._agents.clear()
        for cgroup in reversed(self._made):
            if cgroup.exists():  # a test may have made an end of it
                self.manager.withdraw(cgroup_id(cgroup))
                remove_cgroup(cgroup)
        self._made.clear()

    def _remove_engine(self) -> None:
        for cgroup in reversed(self._engine):
            remove_cgroup(cgroup)

    def reset(self) -> None:
        self.remove_agents()
        self.routes, self.cidrs, self.ports = set(), [], set()
        self.apply()
        self.manager.set_reserved([ipaddress.ip_network(p) for p in RESERVED])
        self.outside("received")
        self.manager.drain_events()

    # -- policy

    def knows(self, agent: Actor, addr: str, identity: int) -> None:
        """The agent was told this address for a name."""
        expires = time.monotonic_ns() + int(FOREVER_S * 1e9)
        self.manager.update_dns(cgroup_id(agent.cgroup), [NameRow(mapped(addr), identity, expires)])

    def route(self, identity: int, port: int, l4: int, to: int, action: RouteAction = RouteAction.PROXY) -> None:
        self.routes.add(RouteRow(1, identity, port, l4, action, to, 3))
        if to:
            self.ports.add(ProxyPort(1, l4, to))

    def cidr(self, prefix: str, l4: int, port: int, action: RouteAction = RouteAction.PASS) -> None:
        self.cidrs.append(CidrRow(1, l4, ipaddress.ip_network(prefix), (Span(port, port, action, 0, 4),)))

    def apply(self) -> None:
        self.manager.sync_routes(self.routes, self.cidrs, self.ports)

    # -- what happened

    def events(self) -> list[accel.KernelEvent]:
        """Records since the last look; what dead agents' sockets still send is left out."""
        living = {cgroup_id(cgroup) for cgroup in self._made}
        return [event for event in self.manager.drain_events() if event.cgroup_id in living]

    def decisions(self) -> list[str]:
        """Records since the last look: "verdict reason"."""
        return [f"{VERDICTS[e.verdict]} {REASONS[e.reason]}" for e in self.events()]

    def arrived(self) -> list[tuple[str, str, int, str]]:
        """What reached servers since the last look: (kind, address, port, data)."""
        return [(r["kind"], r["addr"], r["port"], r["data"]) for r in self.outside("received")]


def cgroup_id(cgroup: Path) -> int:
    """The kernel's number of a cgroup: the inode of its directory."""
    return cgroup.stat().st_ino


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """A network namespace, held by a process that dies with us; gives its pid."""
    holder = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        yield holder.pid
    finally:
        holder.kill()
        holder.wait(10)
        if holder.stdout is not None:
            holder.stdout.close()


def _shell(script: str, netns_pid: int, *arguments: str) -> None:
    command = ["nsenter", f"--net=/proc/{netns_pid}/ns/net", "sh", "-ec", script, "setup", *arguments]
    subprocess.run(command, check=True)


def remove_cgroup(cgroup: Path) -> None:
    """Remove a cgroup once its last process is gone, which may take the kernel a moment."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return cgroup.rmdir()
        except FileNotFoundError:
            return None
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
