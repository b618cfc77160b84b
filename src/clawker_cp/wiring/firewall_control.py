"""
The firewall as AdminService commands it: up, down, rules, certificates, status (contract 6.1).

Up means: programs attached, Envoy running, the compiled policy in force. Down is possible only while
nothing of an agent lives; rules can be changed all the same and hold from the next start of the stack.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

import structlog

from clawker_cp.ebpf import Manager
from clawker_cp.errors import ClawkerError, Conflict, InvalidInput, Unavailable, Unsupported
from clawker_cp.firewall.changes import Applied, Progress
from clawker_cp.firewall.merge import AddStatus, RemoveStatus
from clawker_cp.firewall.plan import CidrRow, ProxyPort, RouteRow
from clawker_cp.firewall.rulebook import RuleBook, too_slow
from clawker_cp.firewall.rules import Rule
from clawker_cp.rpc.admin import FirewallAddresses, FirewallState
from clawker_cp.runtime.health import Probes
from clawker_cp.wiring.link_guard import LinkGuard, Mender

log = structlog.get_logger()

NAMES_SHOWN = 10
RESOLVE_LIMIT_S = 5.0


class Policy(Protocol):
    """The reconciler."""

    async def perform(self, act: Callable[[], Awaitable[Any]]) -> Any: ...
    async def start(self) -> None: ...
    async def reconcile(self) -> Applied: ...
    async def reload(self) -> Applied: ...
    def statistics(self) -> dict[str, int]: ...


class Kernel(Protocol):
    """`ebpf.Manager`, as a whole."""

    @property
    def mender(self) -> Mender: ...
    def flush(self) -> None: ...


class Proxy(Protocol):
    """`EnvoyStack`, as a process."""

    @property
    def running(self) -> bool: ...
    @property
    def lost(self) -> str: ...
    async def stop(self) -> None: ...
    async def supervise(self) -> None: ...
    async def is_healthy(self) -> bool: ...


class Authority(Protocol):
    """`InspectionAuthority`; called in a thread."""

    def open(self) -> None: ...
    def rotate(self) -> None: ...


class AgentVerbs(Protocol):
    """`AgentControl`."""

    async def enable(self, container_id: str) -> None: ...
    async def disable(self, container_id: str) -> None: ...
    async def bypass(self, container_id: str, seconds: int) -> None: ...


class KernelWhenUp:
    """
    The kernel's tables for the reconciler: while the programs are not attached there are none to write.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def sync_routes(
        self, route_rows: Iterable[RouteRow], cidr_rows: Iterable[CidrRow], ports: Iterable[ProxyPort], /
    ) -> object:
        """See `Manager.sync_routes`; nothing to do while it is not loaded, its next load begins empty."""
        return self._manager.sync_routes(route_rows, cidr_rows, ports) if self._manager.loaded else None


class FirewallControl:
    """
    Fulfils `rpc.admin.FirewallHandler`. `load` attaches the programs and tells them what is reserved; `running`
    names the agents that live, `enrol_all` enrols them; `gate_answers` is a probe; `publish_ca` gives agents the CA,
    `take_over` lets listeners use the certificates that are in their files now.
    """

    def __init__(
        self,
        policy: Policy,
        kernel: Kernel,
        proxy: Proxy,
        authority: Authority,
        rules: RuleBook,
        agents: AgentVerbs,
        *,
        load: Callable[[], Awaitable[None]],
        running: Callable[[], Awaitable[Sequence[str]]],
        gate_answers: Callable[[], Awaitable[bool]],
        publish_ca: Callable[[], None],
        take_over: Callable[[], Awaitable[None]],
        addresses: FirewallAddresses,
        enrol_all: Callable[[], Awaitable[None]],
    ) -> None:
        self._policy = policy
        self._kernel = kernel
        self._proxy = proxy
        self._authority = authority
        self._rules = rules
        self._agents = agents
        self._load = load
        self._running = running
        self._gate_answers = gate_answers
        self._publish_ca = publish_ca
        self._take_over = take_over
        self._addresses = addresses
        self._enrol_all = enrol_all
        self._up = asyncio.Event()
        self.guard = LinkGuard(kernel.mender, lambda: self.up)
        self._proxy_probe = Probes([("envoy", proxy.is_healthy)])
        self._gate_probe = Probes([("dns", gate_answers)])

    @property
    def up(self) -> bool:
        """Whether the firewall is on: agents can be started and are enforced."""
        return self._up.is_set()

    def require_up(self) -> None:
        """
        Raise `Conflict` (`FIREWALL_NOT_INITIALIZED`) while the firewall is off, `Unavailable`
        (`ENFORCEMENT_UNAVAILABLE`) while the kernel side is not whole.
        """
        if not self.up:
            raise Conflict(
                "the firewall is off", code="FIREWALL_NOT_INITIALIZED", hint="`clawkerctl firewall up` turns it on"
            )
        self.guard.require_whole()

    async def bring_up(self) -> None:
        """
        Attach, compile, start the proxy, write the maps. Only from the start, or inside the queue.
        """
        await self._load()
        await self._policy.start()
        self._up.set()
        log.info("firewall_up", rules=self._policy.statistics()["rules"])

    async def supervise_proxy(self) -> None:
        """
        Keep Envoy running while the firewall is on, until cancelled.
        """
        while True:
            await self._up.wait()
            await self._proxy.supervise()
            if self._up.is_set():
                return

    # -- AdminService ------------------------------------------------------------------------

    async def init(self, *, limit_s: float) -> FirewallAddresses:
        async def act() -> None:
            if self.up:
                self._require_proxy()
                return
            try:
                await self.bring_up()
            except Unsupported as error:  # the server runs on: it is this that cannot be had now
                raise Unavailable(error.message, code="ENFORCEMENT_UNAVAILABLE", hint=error.hint) from error

        await self._within(limit_s, self._policy.perform(act))
        await self._within(limit_s, self._enrol_all())
        return self._addresses

    async def remove(self, *, limit_s: float) -> None:
        await self._within(limit_s, self._policy.perform(self._take_down))

    async def enable(self, container_id: str) -> None:
        self.require_up()
        await self._agents.enable(container_id)

    async def disable(self, container_id: str) -> None:
        await self._agents.disable(container_id)

    async def bypass(self, container_id: str, seconds: int) -> None:
        self.require_up()
        await self._agents.bypass(container_id, seconds)

    async def add_rules(self, rules: Sequence[Rule], *, limit_s: float) -> tuple[list[AddStatus], bool]:
        before = self._rules.version
        outcomes, applied = await self._rules.put(rules, source="admin", limit_s=limit_s)
        statuses = [outcome.status or AddStatus.UNCHANGED for outcome in outcomes]
        return statuses, applied.live and applied.version != before

    async def remove_rule(
        self, dst: str, proto: str, port: str, path: str, *, everything: bool, limit_s: float
    ) -> tuple[RemoveStatus, bool]:
        if everything:
            status, applied = await self._rules.remove_all(limit_s=limit_s)
        else:
            status, applied = await self._rules.remove(dst, proto, port, path, limit_s=limit_s)
        return status, applied is not None and applied.live

    def list_rules(self) -> list[Rule]:
        return self._rules.stored()

    async def reload(self, *, limit_s: float) -> bool:
        async def act() -> None:
            # Among the changes: their leaves are of one CA, a rotation is whole, and a caller who leaves stops nothing.
            await asyncio.to_thread(self._authority.open)
            await self._take_over()

        await self._within(limit_s, self._policy.perform(act))
        applied: Applied = await self._within(limit_s, self._policy.reload())
        return applied.live

    async def reread(self) -> None:
        """
        SIGHUP: read the rules files again; a bad one changes nothing and is said in the log.
        """
        try:
            applied = await self._policy.reload()
        except ClawkerError as error:
            log.error("policy_refused", cause=str(error), code=error.code)
        else:
            log.info("policy_reloaded", version=applied.version, live=applied.live)

    async def status(self) -> FirewallState:
        proxy = self.up and not await self._proxy_probe.failed()
        gate = self.up and not await self._gate_probe.failed()
        return FirewallState(
            running=self.up and self._proxy.running and gate,
            proxy_healthy=proxy,
            dns_healthy=gate,
            rules=len(self._rules.stored()),
            addresses=self._addresses,
        )

    async def rotate_ca(self, *, limit_s: float) -> bool:
        async def act() -> None:
            await asyncio.to_thread(self._authority.rotate)
            await asyncio.to_thread(self._publish_ca)

        await self._within(limit_s, self._policy.perform(act))
        applied: Applied = await self._within(limit_s, self._policy.reconcile())
        return applied.live

    async def sync_routes(self, *, limit_s: float) -> int:
        self.require_up()
        await self._within(limit_s, self._policy.reconcile())
        return self._policy.statistics()["routes"]

    async def resolve_hostname(self, hostname: str) -> list[str]:
        name = hostname.strip().rstrip(".")
        if not name or len(name) > 253 or not name.isprintable() or " " in name:
            raise InvalidInput(f"hostname: {hostname[:64]!r} is not a name")
        log.info("hostname_resolved", hostname=name)
        try:
            async with asyncio.timeout(RESOLVE_LIMIT_S):
                found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            why = f"no answer within {RESOLVE_LIMIT_S:g} s" if isinstance(error, TimeoutError) else error
            raise ClawkerError(f"{name} was not resolved: {why}", code="RESOLVE_FAILED") from error
        return sorted({str(item[4][0]) for item in found}, key=_order)

    # -- inner -------------------------------------------------------------------------------

    def _require_proxy(self) -> None:
        if self._proxy.lost:
            raise ClawkerError(
                f"Envoy ended and could not be brought back: {self._proxy.lost}", code="ENVOY_RESTART",
                hint="it is tried again every few seconds, and nothing is opened meanwhile",
            )  # fmt: skip

    async def _take_down(self) -> None:
        names = list(await self._running())
        if names:
            shown = ", ".join(sorted(names)[:NAMES_SHOWN])
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            raise Conflict(
                f"{len(names)} agents are running: {shown}{more}",
                code="AGENTS_RUNNING",
                hint="stop them first; for one agent and a limited time use `firewall bypass`",
            )
        if not self.up:
            return
        self._up.clear()
        try:
            await self._proxy.stop()
            await asyncio.to_thread(self._kernel.flush)
        except (ClawkerError, OSError) as error:
            log.error("firewall_down_incomplete", cause=str(error))
            raise
        log.warning("firewall_down")

    async def _within(self, limit_s: float, work: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(limit_s):
                return await work
        except TimeoutError as error:
            raise too_slow(Progress(saved=True), limit_s) from error


def _order(address: str) -> tuple[int, int]:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return parsed.version, int(parsed)


async def gate_answers(address: str, *, limit_s: float = 1.0) -> bool:
    """
    Whether a DNS server at an address says anything at all to a question of this host (it refuses us).
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        # Id 1, one question: "." NS; a stranger gets REFUSED, which is an answer.
        query = b"\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x01"
        async with asyncio.timeout(limit_s):
            await loop.sock_connect(sock, (address, 53))
            await loop.sock_sendall(sock, query)
            return (await loop.sock_recv(sock, 512))[:2] == query[:2]
    except (OSError, TimeoutError):
        return False
    finally:
        sock.close()
