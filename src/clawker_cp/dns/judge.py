"""
Decide one question: verdict, reply, kernel rows and record, in one go without waiting.

What has to be waited for (a forwarder, the proxy) is returned as a `Wait`; the caller waits and
asks again, so whatever changed meanwhile counts (house rule: decide in plain functions). The
servers in `gate.py` are its only callers.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from clawker_cp.accel import Query, build_reply
from clawker_cp.dns import resolved as wire
from clawker_cp.dns.address_answer import Shape
from clawker_cp.dns.addresses import AddressFilter, IPNetwork, kernel_form
from clawker_cp.dns.budgets import Budgets
from clawker_cp.dns.ports import (
    Agents,
    AgentView,
    DnsRecord,
    Internal,
    KernelNames,
    NameRow,
    Policies,
    Records,
    Verdict,
)
from clawker_cp.dns.reserved import CONTROL_PLANE, ReservedNames
from clawker_cp.dns.resolved import AnswerCache, Resolved
from clawker_cp.dns.settings import GateSettings
from clawker_cp.errors import ClawkerError

REFUSED, BADVERS = 5, 16
EDE_OTHER, EDE_BLOCKED, EDE_NOT_TYPE, EDE_PROHIBITED, EDE_UNREACHABLE = 0, 15, 17, 18, 22

ROW_GRACE_S = 300
ROW_MIN_TTL_S = 60
# A row that was written this long ago outlives the TTL the client gets by minutes: it need not be written again.
ROW_FRESH_NS = 30 * 1_000_000_000
WRITTEN_PER_AGENT = 1024
WRITTEN_AGENTS = 4096
NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Wait:
    """What has to happen before a question can be answered: `prepare` the proxy, or else ask a forwarder."""

    policy: int = 0
    prepare: Verdict | None = None


FORWARD = Wait()


@dataclass(slots=True)
class Counts:
    """How questions ended; `dns_queries_total` is made of these."""

    answered: int = 0
    denied: int = 0
    failed: int = 0
    bypassed: int = 0
    from_cache: int = 0
    malformed: int = 0
    unknown_client: int = 0
    kernel_writes: int = 0
    kernel_refusals: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Denial:
    """A verdict of the gate itself."""

    reason: str
    allowed: bool = False
    rule_id: str = ""
    identity: int = 0
    allow_private: bool = False
    zone: str = ""
    concrete: bool = False
    san: str = ""


NOT_ALLOWED = _Denial("not_allowed")
QUARANTINED = _Denial("quarantined")
RESERVED = _Denial("reserved")
MALFORMED = _Denial("malformed")
BUDGET = _Denial("budget")
ADDRESS_REFUSED = _Denial("address_refused")
UNKNOWN_CLIENT = _Denial("unknown_client")
INFRASTRUCTURE = _Denial("answered", allowed=True)


def extended_error(code: int, text: str) -> bytes:
    """Return the EDNS option of an Extended DNS Error (RFC 8914)."""
    raw = text.encode()
    return struct.pack("!HHH", 15, len(raw) + 2, code) + raw


_UNKNOWN = extended_error(EDE_PROHIBITED, "clawker: unknown client")
_NOT_TYPE = extended_error(EDE_NOT_TYPE, "clawker: type not answered")
_NO_WRITE = extended_error(EDE_OTHER, "clawker: enforcement unavailable")
_NO_FORWARDER = extended_error(EDE_UNREACHABLE, "clawker: no forwarder answered")
_NO_PROXY = extended_error(EDE_OTHER, "clawker: proxy not ready")
_BUSY = extended_error(EDE_OTHER, "clawker: too many questions are waiting")
_OVER_BUDGET = extended_error(EDE_BLOCKED, "clawker: budget")
_OWN_WORDS = {"budget": _OVER_BUDGET}


class Judge:
    """All state of the gate but sockets: cache, budgets, what was written to the kernel, counts."""

    def __init__(
        self,
        settings: GateSettings,
        *,
        agents: Agents,
        policies: Policies,
        kernel: KernelNames,
        records: Records,
        internal: Internal | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._agents = agents
        self._policies = policies
        self._kernel = kernel
        self._records = records
        self._reserved = ReservedNames(settings, internal)
        self._ipv6 = settings.ipv6
        self._proxy_client = settings.proxy_view_client
        self._clock_ns = clock_ns
        self._wall_ns = wall_ns
        self._admits = AddressFilter()
        # agent -> question -> (shape, identity, fresh until): what the kernel was told, to skip repeats only.
        self._written: dict[int, dict[bytes, tuple[Shape, int, int]]] = {}
        self._started_hex = format(wall_ns(), "x")
        self._number = 0
        self.cache = AnswerCache(entries=settings.cache_entries, size_bytes=settings.cache_bytes)
        self._cached = self.cache.get
        self.budgets = Budgets(settings.budget)
        self.counts = Counts()

    def set_reserved(self, prefixes: Iterable[IPNetwork]) -> None:
        """Set what no answer may hold (R12); answers that were judged by the old set are dropped."""
        self._admits = AddressFilter(prefixes)
        self.cache.clear()

    def forget(self, cgroup_id: int | None = None) -> None:
        """Drop what is kept of one agent, or of all; to be called when kernel rows were removed."""
        if cgroup_id is None:
            self._written.clear()
            return
        self._written.pop(cgroup_id, None)
        self.budgets.forget(cgroup_id)

    def answer(
        self,
        query: Query,
        client: str,
        began_ns: int,
        proxy: bool,
        limit: int,
        answer: Resolved | None = None,
        again: bool = False,
    ) -> bytes | Wait:
        """
        Answer one question, or say what to wait for.

        `proxy`: asked on the proxy view. `answer`: what a forwarder just said. `again`: the question was
        judged before, so it is not counted a second time.
        """
        agent: AgentView | None = None
        if proxy:
            if self._proxy_client and client != self._proxy_client:
                return self._refuse(query, client, began_ns, limit)
        else:
            agent = self._agents.by_address(client)
            if agent is None:
                return self._refuse(query, client, began_ns, limit)
            if agent.quarantined and query.name != CONTROL_PLANE and not query.rcode:
                return self._deny(query, client, agent, QUARANTINED, began_ns, limit)
        name = query.name
        known = answer or self._cached(query.key)
        if known is None:
            # Neither a reserved name nor what is no question is ever kept, so that a hit need not look.
            if query.rcode:
                return self._malformed(query, client, agent, began_ns, limit)
            reserved = self._reserved.find(name)
            if reserved >= 0:
                return self._own(query, client, agent, reserved, began_ns, limit)
            if query.odd or not name:
                return self._deny(query, client, agent, MALFORMED if query.odd else NOT_ALLOWED, began_ns, limit)
        elif answer is None and began_ns >= known.expires_ns:
            self.cache.discard(query.key)
            known = None
        if agent is None:
            verdict = self._policies.for_proxy(name) or NOT_ALLOWED
        else:
            verdict = self._policies.decide(agent.policy, name)
        bypassed = False
        if not verdict.allowed:
            if agent is None or not agent.bypassed:
                return self._deny(query, client, agent, verdict, began_ns, limit)
            bypassed = True
        elif agent is not None:
            if verdict.zone and not self.budgets.spend(
                agent.cgroup_id,
                verdict.zone,
                name,
                query.qtype,
                began_ns,
                key=agent.key,
                leaves=known is None,
                again=again,
            ):
                return self._deny(query, client, agent, BUDGET, began_ns, limit)
            if verdict.concrete or verdict.san:
                return Wait(agent.policy, verdict)
        if known is None:
            if query.qtype not in wire.FORWARDED or (query.qtype == wire.AAAA and not self._ipv6):
                return self._without_data(query, client, agent, verdict, began_ns, limit, bypassed)
            return FORWARD
        return self._release(query, client, agent, verdict, known, began_ns, limit, bypassed, answer is None)

    def _refuse(self, query: Query, client: str, began_ns: int, limit: int) -> bytes:
        """Answer somebody who has nothing to ask here."""
        self.counts.unknown_client += 1
        return self._say(query, client, None, UNKNOWN_CLIENT, began_ns, REFUSED, option=_UNKNOWN, limit=limit)

    def fail(self, query: Query, client: str, wait: Wait | None, began_ns: int, *, proxy: bool, limit: int) -> bytes:
        """Answer SERVFAIL for what could not be waited for; `wait` None = too many are waiting."""
        agent = None if proxy else self._agents.by_address(client)
        if wait is None:
            return self._say(
                query, client, agent, _Denial("forwarder_failed"), began_ns, wire.SERVFAIL, option=_BUSY, limit=limit
            )
        reason, option = ("proxy_not_ready", _NO_PROXY) if wait.prepare else ("forwarder_failed", _NO_FORWARDER)
        return self._say(query, client, agent, _Denial(reason), began_ns, wire.SERVFAIL, option=option, limit=limit)

    def _release(
        self,
        query: Query,
        client: str,
        agent: AgentView | None,
        verdict: Verdict,
        known: Resolved,
        began_ns: int,
        limit: int,
        bypassed: bool,
        cached: bool,
    ) -> bytes:
        """Let an answer go: filter, kernel first (I7), reply."""
        if known.failed:
            return self._say(
                query,
                client,
                agent,
                _Denial("forwarder_failed", rule_id=verdict.rule_id),
                began_ns,
                wire.SERVFAIL,
                option=_NO_FORWARDER,
                limit=limit,
            )
        shape = known.shape(self._admits, private=verdict.allow_private or known.own_zone)
        if shape.refused:
            return self._deny(query, client, agent, ADDRESS_REFUSED, began_ns, limit, rule_id=verdict.rule_id)
        if shape.rows and agent is not None and not bypassed:
            written = self._written.get(agent.cgroup_id)
            last = None if written is None else written.get(query.key)
            stale = last is None or last[0] is not shape or last[1] != verdict.identity or began_ns >= last[2]
            if stale and not self._write(agent.cgroup_id, query.key, shape, verdict.identity):
                return self._unwritten(query, client, agent, verdict, began_ns, limit)
        age_s = (began_ns - known.received_ns) // NS if began_ns > known.received_ns else 0
        reply = build_reply(
            query, known.rcode, shape.body, shape.answers, shape.authority, shape.ttl_offsets, age_s, b"", limit
        )
        self._record(
            query, client, agent, verdict, began_ns, known.rcode, bypassed, cached, verdict.zone or known.zone,
            shape.addresses, shape.answers, verdict.rule_id,
        )  # fmt: skip
        return reply

    def _write(self, cgroup_id: int, key: bytes, shape: Shape, identity: int) -> bool:
        """Tell the kernel whose addresses these are; False if it does not take them, and nothing may be answered."""
        now_ns = self._clock_ns()
        rows = [
            NameRow(
                address,
                identity,
                now_ns + (min(max(ttl, ROW_MIN_TTL_S), wire.MAX_LIFE_S) + ROW_GRACE_S) * NS,
            )
            for address, ttl in shape.rows
        ]
        try:
            self._kernel.update_dns(cgroup_id, rows)
        except (ClawkerError, OSError):
            self.counts.kernel_refusals += 1
            return False
        self.counts.kernel_writes += 1
        written = self._written.get(cgroup_id)
        if written is None:
            if len(self._written) >= WRITTEN_AGENTS:
                self._written.clear()
            written = self._written[cgroup_id] = {}
        elif len(written) >= WRITTEN_PER_AGENT:
            written.clear()
        written[key] = (shape, identity, now_ns + ROW_FRESH_NS)
        return True

    def _unwritten(
        self, query: Query, client: str, agent: AgentView, verdict: Verdict, began_ns: int, limit: int
    ) -> bytes:
        denial = _Denial("map_write_failed", rule_id=verdict.rule_id)
        return self._say(query, client, agent, denial, began_ns, wire.SERVFAIL, option=_NO_WRITE, limit=limit)

    def _own(
        self, query: Query, client: str, agent: AgentView | None, reserved: int, began_ns: int, limit: int
    ) -> bytes:
        """Answer a reserved name; a rule for it only decides whether the address may be reached."""
        address = self._reserved.address(reserved)
        if not address:
            return self._deny(query, client, agent, RESERVED, began_ns, limit)
        kind = wire.A if len(address) == 4 else wire.AAAA
        if query.qtype != kind:
            body = wire.negative_authority(query.question)
            return self._say(query, client, agent, INFRASTRUCTURE, began_ns, 0, body=body, authority=1, limit=limit)
        if agent is not None:
            verdict = self._policies.decide(agent.policy, query.name)
            if verdict.allowed and verdict.identity:
                shape = Shape(b"", 0, 0, (), ((kernel_form(address), ROW_MIN_TTL_S),), (), refused=False)
                if not self._write(agent.cgroup_id, query.key, shape, verdict.identity):
                    return self._unwritten(query, client, agent, verdict, began_ns, limit)
        body = b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, ROW_MIN_TTL_S, len(address)) + address
        return self._say(
            query, client, agent, INFRASTRUCTURE, began_ns, 0, body=body, answers=1, limit=limit, addresses=(address,)
        )

    def _without_data(
        self,
        query: Query,
        client: str,
        agent: AgentView | None,
        verdict: Verdict,
        began_ns: int,
        limit: int,
        bypassed: bool,
    ) -> bytes:
        """Answer types that never leave: ANY, AAAA while IPv6 is not routed, and all that nobody needs."""
        if query.qtype == wire.ANY:
            return self._say(
                query,
                client,
                agent,
                verdict,
                began_ns,
                0,
                body=wire.HINFO_ANY,
                answers=1,
                limit=limit,
                bypassed=bypassed,
            )
        body = wire.negative_authority(query.question)
        if query.qtype == wire.AAAA:
            return self._say(
                query, client, agent, verdict, began_ns, 0, body=body, authority=1, limit=limit, bypassed=bypassed
            )
        denial = _Denial("type", rule_id=verdict.rule_id, zone=verdict.zone)
        return self._say(
            query, client, agent, denial, began_ns, 0, body=body, authority=1, option=_NOT_TYPE, limit=limit
        )

    def _malformed(self, query: Query, client: str, agent: AgentView | None, began_ns: int, limit: int) -> bytes:
        self.counts.malformed += 1
        return self._say(query, client, agent, MALFORMED, began_ns, query.rcode, limit=limit)

    def _deny(
        self,
        query: Query,
        client: str,
        agent: AgentView | None,
        verdict: Verdict,
        began_ns: int,
        limit: int,
        *,
        rule_id: str = "",
    ) -> bytes:
        """Answer NXDOMAIN with the reason: a denied name looks like one that does not exist, at once."""
        option = b""
        if query.edns:
            option = _OWN_WORDS.get(verdict.reason) or extended_error(
                EDE_BLOCKED, f"clawker: not allowed; {verdict.reason}; d-{self._started_hex}-{self._number + 1}"
            )
        body = wire.negative_authority(query.question)
        return self._say(
            query,
            client,
            agent,
            verdict,
            began_ns,
            wire.NXDOMAIN,
            body=body,
            authority=1,
            option=option,
            limit=limit,
            rule_id=rule_id,
        )

    def _say(
        self,
        query: Query,
        client: str,
        agent: AgentView | None,
        verdict: Verdict,
        began_ns: int,
        rcode: int,
        *,
        limit: int,
        body: bytes = b"",
        answers: int = 0,
        authority: int = 0,
        option: bytes = b"",
        addresses: tuple[bytes, ...] = (),
        bypassed: bool = False,
        rule_id: str = "",
    ) -> bytes:
        self._record(
            query, client, agent, verdict, began_ns, rcode, bypassed, True, verdict.zone, addresses, answers,
            rule_id or verdict.rule_id,
        )  # fmt: skip
        return build_reply(query, rcode, body, answers, authority, (), 0, option, limit)

    def _record(
        self,
        query: Query,
        client: str,
        agent: AgentView | None,
        verdict: Verdict,
        began_ns: int,
        rcode: int,
        bypassed: bool,
        cached: bool,
        zone: str,
        answers: tuple[bytes, ...],
        answer_count: int,
        rule_id: str,
    ) -> None:
        """Count the question and hand its record on; every question ends here exactly once."""
        counts = self.counts
        self._number += 1
        reason = verdict.reason
        if verdict.allowed:
            counts.answered += 1
            outcome = "allowed"
        elif bypassed:
            counts.bypassed += 1
            outcome, reason = "bypassed", "answered"
        else:
            if rcode == wire.SERVFAIL:
                counts.failed += 1
                outcome = "failed"
            else:
                counts.denied += 1
                outcome = "denied"
            counts.reasons[reason] = counts.reasons.get(reason, 0) + 1
        if cached:
            counts.from_cache += 1
        if agent is None:
            cgroup_id, key, policy = 0, "", 0
        else:
            cgroup_id, key, policy = agent.cgroup_id, agent.key, agent.policy
        self._records.dns(
            DnsRecord(
                self._started_hex,
                self._number,
                self._wall_ns(),
                client,
                cgroup_id,
                key,
                policy,
                query.name,
                query.qtype,
                rcode,
                outcome,
                reason,
                rule_id,
                zone or ".",
                answers,
                answer_count,
                self._clock_ns() - began_ns,
                cached,
            )
        )
