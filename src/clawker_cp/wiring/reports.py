"""
From kernel ring, gate and proxy log into flow records, and what a client of `run` is shown.

Fulfils `dns.ports.Records` and `rpc.local_server.Reports`. Never blocks and never raises into
what it observes (I12).
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from clawker_cp.agents.roster import Roster
from clawker_cp.dns.ports import DnsRecord
from clawker_cp.ebpf import Manager
from clawker_cp.engines.base import RingEvent
from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.documents import emit_rules
from clawker_cp.firewall.rules import Rule, normalise
from clawker_cp.firewall.shorthand import shorthand_for
from clawker_cp.telemetry import enrich
from clawker_cp.telemetry.connections import Connections, Live
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import DENIED, DNS, KERNEL, Flow
from clawker_cp.telemetry.summary import Destination, Summary, learned

DRAIN_RECORDS = 256  # about half a millisecond of the loop
# Between looks at the ring. A quiet one is looked at less often; 200,000 records a second fill it in 0.2 s.
POLL_S, QUIET_POLL_S, QUIETER = 0.01, 0.05, 1.2
NAMES_PER_AGENT = 4096
ENDINGS_KEPT = 256
SETTLE_S = 0.25


class Reports:
    """
    One per server. `exit_code` looks up how a sandbox ended, `count` sees every record, `count_dns` every question
    of an agent. `hits` is when each rule last decided, in Unix seconds, since the start.
    """

    def __init__(
        self,
        flows: FlowLog,
        roster: Roster,
        connections: Connections,
        manager: Manager,
        rule_ids: Callable[[], tuple[str, ...]],
        exit_code: Callable[[str], int | None],
        *,
        count: Callable[[list[Flow]], None] = lambda _flows: None,
        count_dns: Callable[[DnsRecord], None] = lambda _record: None,
    ) -> None:
        self._flows = flows
        self._roster = roster
        self._connections = connections
        self._manager = manager
        self._rule_ids = rule_ids
        self._exit_code = exit_code
        self._count = count
        self._count_dns = count_dns
        self.hits: dict[str, int] = {}
        self._names: dict[int, OrderedDict[str, str]] = {}
        self._sequences = enrich.Sequences()
        self._summaries: dict[str, Summary] = {}
        self._learned: dict[str, list[Flow]] = {}
        self._endings: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._ring_drops = 0

    # -- sources ------------------------------------------------------------------------------

    def dns(self, record: DnsRecord) -> None:
        """
        Take one record of the gate.
        """
        if not record.cgroup_id:
            return
        self._count_dns(record)
        names = self._names.setdefault(record.cgroup_id, OrderedDict())
        for answer in record.answers:
            names[enrich.address_text(answer)] = record.name.rstrip(".")
        while len(names) > NAMES_PER_AGENT:
            names.popitem(last=False)
        # An AAAA question of an allowed name is answered empty; that is no decision to show.
        self._take([enrich.from_dns(record, self._roster.by_cgroup(record.cgroup_id))])

    def proxy(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """
        Take lines of the proxy's access log.
        """
        flows = []
        for line in lines:
            remote = str(line.get("downstream_remote") or "")
            agent = self._roster.by_address(remote.rpartition(":")[0])
            flow = enrich.from_proxy(line, agent)
            begins = Connections.begins(line)
            if begins and flow.verdict != DENIED:
                listener = int(line.get("listener_port") or 0)
                live = Live(flow.host, flow.port, flow.proto in {"https", "wss"}, listener)
                self._connections.see(remote, live)
            # A refusal is whole at its end, what passes is shown as it begins; UDP has only an end.
            shown = not begins if flow.verdict == DENIED or flow.proto == "udp" else begins
            if agent is not None and (shown or flow.status >= 400):
                flows.append(flow)
        self._take(flows)

    def ring(self, event: RingEvent) -> None:
        """
        Take one packet that the host ring dropped (R18).
        """
        agent = self._roster.by_id(event.sandbox_id)
        self._ring_drops += 1
        flow = Flow(
            event_id=f"r-{event.time_unix_ns:x}-{self._ring_drops}",
            time_unix_ns=event.time_unix_ns,
            container_id=event.sandbox_id,
            project=agent.project if agent else "",
            agent=agent.agent if agent else "",
            layer=KERNEL,
            verdict=DENIED,
            reason=event.reason,
            policy=agent.policy if agent else 0,
            proto={6: "tcp", 17: "udp", 1: "icmp"}.get(event.protocol, "other"),
            address=event.destination,
            port=event.destination_port,
            lost_before=event.lost,
            hook="ring",
        )
        self._take([flow])

    def forget(self, cgroup_id: int) -> None:
        """
        Drop what was kept of an agent that is gone: the names it was told, its last number.
        """
        self._names.pop(cgroup_id, None)
        self._sequences.forget(cgroup_id)

    async def poll_kernel(self) -> None:
        """
        Drain the event ring until cancelled, a bounded number of records at a time.
        """
        pause_s = POLL_S
        while True:
            taken = self.drain_kernel()
            if taken == DRAIN_RECORDS:
                await asyncio.sleep(0)
                continue
            pause_s = next_pause(pause_s, taken)
            await asyncio.sleep(pause_s)

    def drain_kernel(self) -> int:
        """
        Take what waits in the ring; returns how many records.
        """
        events = self._manager.drain_events(DRAIN_RECORDS)
        if not events:
            return 0
        flows = enrich.kernel_flows(
            events,
            self._roster.by_cgroup,
            offset_ns=enrich.monotonic_offset_ns(),
            rule_ids=self._rule_ids(),
            name_of=self._name_of,
            sequences=self._sequences,
        )
        self._take(flows)
        return len(events)

    def _name_of(self, cgroup_id: int, address: str) -> str:
        names = self._names.get(cgroup_id)
        return names.get(address, "") if names else ""

    def _take(self, flows: list[Flow]) -> None:
        self._flows.add(flows)
        self._count(flows)
        for flow in flows:
            if flow.rule_id:
                self.hits[flow.rule_id] = flow.time_unix_ns // 1_000_000_000
        by_agent: dict[str, list[Flow]] = {}
        for flow in flows:
            if flow.container_id and (flow.layer != DNS or flow.verdict == DENIED):
                by_agent.setdefault(flow.container_id, []).append(flow)
        for container_id, mine in by_agent.items():
            self._summaries.setdefault(container_id, Summary()).add(mine)
            agent = self._roster.by_id(container_id)
            if agent is not None and agent.learn:
                kept = self._learned.setdefault(container_id, [])
                kept += mine[: max(0, self._flows.memory_limit - len(kept))]

    # -- what clients see ---------------------------------------------------------------------

    @asynccontextmanager
    async def watch(self, sandbox_id: str) -> AsyncIterator[AsyncIterator[Mapping[str, Any]]]:
        """
        Follow the records of one sandbox, beginning with those already taken.
        """
        async with self._flows.subscribe(sandbox_id) as subscription:
            earlier = self._flows.recent(sandbox_id)

            async def follow() -> AsyncIterator[Mapping[str, Any]]:
                for flow in earlier:
                    yield flow.as_mapping()
                while True:
                    for flow in await subscription.next_batch():
                        yield flow.as_mapping()

            yield follow()

    async def settle(self, sandbox_id: str) -> None:
        """
        Wait until the records of a command that just ended have come in, at most a moment.
        """
        until = time.monotonic() + SETTLE_S
        seen = -1
        while time.monotonic() < until:
            self.drain_kernel()
            now = self._flows.taken
            if now == seen:
                break
            seen = now
            await asyncio.sleep(0.12)

    def ending(self, sandbox_id: str) -> Mapping[str, Any]:
        """
        What is told at the end: exit code, summary lines, learned rules; kept for late comers.
        """
        known = self._endings.get(sandbox_id)
        if known is not None:
            return known
        code = self._exit_code(sandbox_id)
        if code is None:
            return {}
        summary = self._summaries.pop(sandbox_id, Summary())
        ending: dict[str, Any] = {"code": code, "summary": summary.lines(allow_option)}
        ending["allowed"] = sum(summary.allowed.values())
        ending["denied"] = sum(summary.denied.values())
        flows = self._learned.pop(sandbox_id, None)
        if flows is not None:
            rules = [normalise(Rule(d.host, d.proto, str(d.port) if d.port else "")) for d in learned(flows)]
            ending["learned_rules"] = emit_rules(rules)
        self._endings[sandbox_id] = ending
        while len(self._endings) > ENDINGS_KEPT:
            self._endings.popitem(last=False)
        return ending


def next_pause(pause_s: float, taken: int) -> float:
    """
    How long to leave the ring alone after a look that took so many records, `pause_s` after the one before.
    """
    return POLL_S if taken else min(pause_s * QUIETER, QUIET_POLL_S)


def allow_option(target: Destination) -> str:
    """
    The option of `run` that would have allowed a refused destination, "" when none would.
    """
    if not target.host or target.proto not in {"https", "http", "ws", "wss", "tcp", "udp", "ssh"}:
        return ""
    proto = {("tcp", 443): "https", ("tcp", 80): "http", ("tcp", 22): "ssh"}.get(
        (target.proto, target.port), target.proto
    )
    if not target.port and proto in {"tcp", "udp"}:
        return ""
    try:
        text = shorthand_for(target.host, proto, target.port, target.path, target.method)
    except (ClawkerError, ValueError):
        return ""
    # Path and method are the agent's words, and this is text that people paste into a shell.
    return f"--allow {shlex.quote(text)}"
