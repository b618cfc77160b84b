"""
From what the kernel, the gate and the proxy report to `Flow`. Pure.

Names for kernel addresses come from a look-up that the caller passes in; what is not known stays
empty rather than guessed.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from clawker_cp.accel import KernelEvent
from clawker_cp.telemetry.flows import ALLOWED, BYPASSED, DENIED, DNS, KERNEL, PROXY, REDIRECTED, Flow

# Equal enum clawker_reason of bpf/clawker_abi.h; a test compares.
REASONS = {
    0: "", 1: "not_enrolled", 2: "quarantined", 3: "engine_resolver", 4: "no_route", 5: "rule_deny",
    6: "route_expired", 7: "family", 8: "protocol", 9: "ipv6_unrouted", 10: "ip_options", 11: "socket_option",
    12: "fragment", 13: "inbound", 14: "proxy_port", 15: "map_full", 16: "config_missing", 17: "malformed",
    64: "bypass", 65: "dns", 66: "loopback", 67: "infrastructure", 68: "address_rule", 69: "name_route",
    70: "catch_all", 71: "learn", 72: "inbound_reply",
}  # fmt: skip
HOOKS = {
    1: "connect4", 2: "connect6", 3: "sendmsg4", 4: "sendmsg6", 5: "sock_create", 6: "setsockopt", 7: "bind4",
    8: "bind6", 9: "egress", 10: "ingress",
}  # fmt: skip
_KERNEL_VERDICTS = {1: ALLOWED, 2: DENIED, 3: BYPASSED, 4: REDIRECTED}
_DNS_VERDICTS = {"allowed": ALLOWED, "denied": DENIED, "bypassed": BYPASSED, "failed": DENIED}
_PROTOCOLS = {6: "tcp", 17: "udp", 1: "icmp", 58: "icmp", 255: "other"}
_QUERY_TYPES = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 10: "NULL", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV",
    64: "SVCB", 65: "HTTPS", 255: "ANY", 257: "CAA",
}  # fmt: skip
SOCK_RAW = 3


class Who(Protocol):
    """The agent a record belongs to."""

    @property
    def id(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def agent(self) -> str: ...


class DnsRecordLike(Protocol):
    """`dns.ports.DnsRecord`."""

    @property
    def event_id(self) -> str: ...
    @property
    def time_ns(self) -> int: ...
    @property
    def policy(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def qtype(self) -> int: ...
    @property
    def verdict(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def rule_id(self) -> str: ...
    @property
    def answers(self) -> tuple[bytes, ...]: ...
    @property
    def duration_ns(self) -> int: ...


@lru_cache(maxsize=16384)
def address_text(addr: bytes) -> str:
    """
    Text of 4 or 16 octets; a mapped IPv4 address reads as IPv4, nothing reads as nothing.
    """
    if not any(addr):
        return ""
    if len(addr) == 16 and addr[:12] == b"\0" * 10 + b"\xff\xff":
        addr = addr[12:]
    return socket.inet_ntop(socket.AF_INET if len(addr) == 4 else socket.AF_INET6, addr)


def monotonic_offset_ns() -> int:
    """
    What to add to kernel time to get Unix time.
    """
    return time.time_ns() - time.monotonic_ns()


class Sequences:
    """
    The last number of each agent's series, to tell how many records are missing before the next.
    """

    def __init__(self) -> None:
        self.last: dict[int, int] = {}

    def forget(self, cgroup_id: int) -> None:
        """
        Drop an agent that is gone; cgroup ids are not reused.
        """
        self.last.pop(cgroup_id, None)


def kernel_flows(
    events: Iterable[KernelEvent],
    who_of: Callable[[int], Who | None],
    *,
    offset_ns: int,
    rule_ids: Sequence[str],
    name_of: Callable[[int, str], str],
    sequences: Sequences,
) -> list[Flow]:
    """
    Kernel decisions, many at a time; `name_of(cgroup_id, address)` gives the name the agent was told, or "".

    `who_of(cgroup_id)` is asked once per agent and call. A gap in an agent's series is the `lost_before`
    of the record after it. CPUs may hand in records out of order: that is no gap.
    """
    flows: list[Flow] = []
    append, last, rules = flows.append, sequences.last, len(rule_ids)
    known: dict[int, tuple[str, str, str, str]] = {}
    for (
        ktime_ns, cgroup_id, sequence, _cookie, addr, _identity, policy, rule, uid, pid, port, proxy_port, verdict,
        reason, hook, _family, protocol, kind, flags,
    ) in events:  # fmt: skip
        labels = known.get(cgroup_id)
        if labels is None:
            who = who_of(cgroup_id)
            prefix = f"k-{cgroup_id:x}-"
            labels = known[cgroup_id] = (prefix, who.id, who.project, who.agent) if who else (prefix, "", "", "")
        prefix, container_id, project, agent = labels
        before = last.get(cgroup_id, sequence - 1)
        lost = sequence - before - 1
        if lost >= 0:
            last[cgroup_id] = sequence
        address = "" if flags & 1 else address_text(addr)
        append(
            Flow(
                f"{prefix}{sequence}",
                ktime_ns + offset_ns,
                container_id,
                project,
                agent,
                KERNEL,
                _KERNEL_VERDICTS.get(verdict, DENIED),
                REASONS.get(reason) or f"reason_{reason}",
                rule_ids[rule] if rule < rules else "",
                policy,
                "raw" if kind == SOCK_RAW else _PROTOCOLS.get(protocol, "other"),
                name_of(cgroup_id, address) if address else "",
                address,
                port,
                proxy_port,
                uid=uid,
                pid=pid,
                sequence=sequence,
                lost_before=lost if lost > 0 else 0,
                hook=HOOKS.get(hook, ""),
            )
        )
    return flows


def from_dns(record: DnsRecordLike, who: Who | None) -> Flow:
    """
    A question of an agent and what became of it.
    """
    return Flow(
        event_id=record.event_id,
        time_unix_ns=record.time_ns,
        container_id=who.id if who else "",
        project=who.project if who else "",
        agent=who.agent if who else "",
        layer=DNS,
        verdict=_DNS_VERDICTS.get(record.verdict, DENIED),
        reason=record.reason,
        rule_id=record.rule_id,
        policy=record.policy,
        proto="dns",
        host=record.name.rstrip("."),
        address=address_text(record.answers[0]) if record.answers else "",
        query_type=_QUERY_TYPES.get(record.qtype, f"TYPE{record.qtype}"),
        duration_us=record.duration_ns // 1000,
    )


def from_proxy(line: Mapping[str, Any], who: Who | None) -> Flow:
    """
    A line of the proxy's access log.
    """
    host, port = _host_and_port(line)
    status = _number(line.get("response_code"))
    denied = line.get("action") == "denied"
    reason = str(line.get("reason") or ("host_not_allowed" if denied else "forwarded"))
    if not denied and status >= 500 and line.get("response_flags") not in {None, "-", ""}:
        reason = "origin_error"
    if line.get("action") is None and status >= 400:
        denied, reason = True, "request_refused"
    return Flow(
        event_id=str(line.get("event_id") or ""),
        time_unix_ns=_number(line.get("start_time_ns")) or time.time_ns(),
        container_id=who.id if who else "",
        project=who.project if who else "",
        agent=who.agent if who else "",
        layer=PROXY,
        verdict=DENIED if denied else ALLOWED,
        reason=reason,
        rule_id=str(line.get("rule") or ""),
        policy=_number(line.get("policy")),
        proto=_proxy_proto(line),
        host=host,
        address=str(line.get("network.peer.address") or "") if not denied else "",
        port=port,
        method=str(line.get("method") or ""),
        path=str(line.get("path") or ""),
        status=status,
        bytes_sent=_number(line.get("bytes_received")),
        bytes_received=_number(line.get("bytes_sent")),
        duration_us=_number(line.get("duration_ms")) * 1000,
    )


def _proxy_proto(line: Mapping[str, Any]) -> str:
    name = str(line.get("network.protocol.name") or "")
    if name == "tls":
        return "https"
    if name == "http":
        secure = line.get("tls.established") == "true"
        if line.get("upgrade"):
            return "wss" if secure else "ws"
        return "https" if secure else "http"
    return str(line.get("network.transport") or "tcp")


def _host_and_port(line: Mapping[str, Any]) -> tuple[str, int]:
    text = str(line.get("server.address") or "")
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or (":" in host and not host.startswith("[")):
        host, port = text, ""
    number = _number(port) or _number(line.get("server.port"))
    if not number:
        proto = _proxy_proto(line)
        number = {"https": 443, "wss": 443, "http": 80, "ws": 80}.get(proto, 0)
    return host.strip("[]").lower(), number


def _number(value: Any) -> int:
    if isinstance(value, bool) or value is None:
        return 0
    if isinstance(value, int | float):
        return int(value)
    text = str(value)
    return int(text) if text.isdecimal() else 0


def is_address(text: str) -> bool:
    """
    Whether a host is an address rather than a name.
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
