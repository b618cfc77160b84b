"""
From reports of kernel, gate and proxy to records.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.accel import KernelEvent
from clawker_cp.telemetry import enrich
from clawker_cp.telemetry.enrich import HOOKS, REASONS, Sequences, address_text, from_proxy, kernel_flows
from clawker_cp.telemetry.flows import ALLOWED, BYPASSED, DENIED, KERNEL, PROTOS, PROXY, REDIRECTED, Flow

HEADER = Path(__file__).parents[3] / "bpf" / "clawker_abi.h"
V4 = b"\0" * 10 + b"\xff\xff" + socket.inet_aton("203.0.113.7")


class Agent:
    id, project, agent = "c" * 64, "p", "a"


def event(**more: Any) -> KernelEvent:
    fields: dict[str, Any] = dict.fromkeys(KernelEvent._fields, 0) | {
        "ktime_ns": 5, "cgroup_id": 0xAB, "sequence": 9, "addr": V4, "policy": 3, "rule": 0xFFFFFFFF, "uid": 1001,
        "pid": 77, "port": 443, "proxy_port": 12001, "verdict": 4, "reason": 69, "hook": 1, "protocol": 6, "type": 1,
    } | more  # fmt: skip
    return KernelEvent(**fields)


def one(who: Agent | None, **more: object) -> Flow:
    (flow,) = kernel_flows(
        [event(**more)], lambda _cgroup: who, offset_ns=100, rule_ids=("r0", "r1"),
        name_of=lambda cgroup, address: f"{cgroup:x}.{address}.name" if who else "", sequences=Sequences(),
    )  # fmt: skip
    return flow


def enum(name: str, prefix: str) -> dict[int, str]:
    body = re.search(rf"enum {name} {{(.*?)}};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    found = re.findall(rf"{prefix}(\w+) = (\d+)", body[1])
    return {int(number): key.lower() for key, number in found}


def test_names_equal_the_abi() -> None:
    """Reasons and hooks have the names of the kernel's enums, all of them."""
    assert {**REASONS, 0: "none"} == enum("clawker_reason", "CLAWKER_R_")
    assert {**HOOKS, 0: "none"} == enum("clawker_hook", "CLAWKER_H_")


def test_kernel_record() -> None:
    """Every field of a kernel record lands where the contract wants it."""
    assert one(Agent()) == Flow(
        event_id="k-ab-9", time_unix_ns=105, container_id="c" * 64, project="p", agent="a", layer=KERNEL,
        verdict=REDIRECTED, reason="name_route", policy=3, proto="tcp", host="ab.203.0.113.7.name",
        address="203.0.113.7", port=443, proxy_port=12001, uid=1001, pid=77, sequence=9, hook="connect4",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"verdict": 1}, "verdict", ALLOWED),
        ({"verdict": 3}, "verdict", BYPASSED),
        ({"verdict": 99}, "verdict", DENIED),
        ({"reason": 63}, "reason", "reason_63"),
        ({"rule": 1}, "rule_id", "r1"),
        ({"rule": 2}, "rule_id", ""),
        ({"protocol": 17}, "proto", "udp"),
        ({"protocol": 58}, "proto", "icmp"),
        ({"protocol": 132}, "proto", "other"),
        ({"type": 3}, "proto", "raw"),
        ({"flags": 1}, "address", ""),
        ({"flags": 1}, "host", ""),
        ({"addr": socket.inet_pton(socket.AF_INET6, "2001:db8::1")}, "address", "2001:db8::1"),
        ({"hook": 200}, "hook", ""),
    ],
)
def test_kernel_variants(given: dict[str, object], field: str, value: object) -> None:
    """What is unknown is named as such or left empty, and an unknown verdict reads as a denial."""
    assert getattr(one(Agent(), **given), field) == value


def test_unknown_agent() -> None:
    """A record of a cgroup that nobody knows is kept, without an agent."""
    flow = one(None)

    assert (flow.event_id, flow.container_id, flow.host) == ("k-ab-9", "", "")


def test_gaps_are_counted_per_agent() -> None:
    """Missing numbers of a series belong to the record after them; order of CPUs and a first record are no gap."""
    sequences = Sequences()

    def lost(*numbers: tuple[int, int]) -> list[int]:
        events = [event(cgroup_id=cgroup, sequence=sequence) for cgroup, sequence in numbers]
        flows = kernel_flows(
            events, lambda _c: None, offset_ns=0, rule_ids=(), name_of=lambda _c, _a: "", sequences=sequences
        )
        return [flow.lost_before for flow in flows]

    assert lost((1, 10), (1, 11), (2, 50), (1, 15)) == [0, 0, 0, 3]
    assert lost((1, 14), (1, 16), (2, 52)) == [0, 0, 1]
    sequences.forget(1)
    assert lost((1, 900)) == [0]


@pytest.mark.parametrize(
    ("octets", "text"),
    [(b"", ""), (b"\0" * 16, ""), (V4, "203.0.113.7"), (V4[12:], "203.0.113.7"), (b"\xfe\x80" + b"\0" * 14, "fe80::")],
)
def test_address_text(octets: bytes, text: str) -> None:
    """Mapped IPv4 reads as IPv4, nothing reads as nothing."""
    assert address_text(octets) == text


LINE = {
    "server.address": "API.example.com", "network.protocol.name": "http", "tls.established": "true",
    "network.transport": "tcp", "action": "allowed", "reason": "forwarded", "rule": "https:api.example.com",
    "policy": "3", "method": "GET", "path": "/v1", "response_code": 200, "bytes_sent": 10, "bytes_received": 20,
    "duration_ms": 7, "network.peer.address": "203.0.113.7", "event_id": "p-4-17", "start_time_ns": "17",
}  # fmt: skip


def test_proxy_line() -> None:
    """A line of the proxy becomes a record seen from the agent: what the proxy received is what the agent sent."""
    assert from_proxy(LINE, Agent()) == Flow(
        event_id="p-4-17", time_unix_ns=17, container_id="c" * 64, project="p", agent="a", layer=PROXY, verdict=ALLOWED,
        reason="forwarded", rule_id="https:api.example.com", policy=3, proto="https", host="api.example.com",
        address="203.0.113.7", port=443, method="GET", path="/v1", status=200, bytes_sent=20, bytes_received=10,
        duration_us=7000,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"action": "denied", "reason": "path_denied", "response_code": 403}, (DENIED, "path_denied", "https", 443)),
        ({"action": "denied", "reason": None}, (DENIED, "host_not_allowed", "https", 443)),
        ({"action": None, "reason": None, "response_code": 400}, (DENIED, "request_refused", "https", 443)),
        ({"response_code": 503, "response_flags": "UF"}, (ALLOWED, "origin_error", "https", 443)),
        ({"response_code": 503, "response_flags": "-"}, (ALLOWED, "forwarded", "https", 443)),
        ({"tls.established": "false"}, (ALLOWED, "forwarded", "http", 80)),
        ({"upgrade": "websocket"}, (ALLOWED, "forwarded", "wss", 443)),
        ({"network.protocol.name": "tls"}, (ALLOWED, "forwarded", "https", 443)),
        ({"network.protocol.name": "tcp", "server.port": "5432"}, (ALLOWED, "forwarded", "tcp", 5432)),
        ({"server.address": "api.example.com:8443"}, (ALLOWED, "forwarded", "https", 8443)),
        ({"server.address": "[2001:db8::1]:8443"}, (ALLOWED, "forwarded", "https", 8443)),
        ({"server.address": None}, (ALLOWED, "forwarded", "https", 443)),
    ],
)
def test_proxy_variants(given: dict[str, object], expected: tuple[str, str, str, int]) -> None:
    """Verdict, reason, protocol and port for each kind of line."""
    flow = from_proxy({**LINE, **given}, None)

    assert (flow.verdict, flow.reason, flow.proto, flow.port) == expected
    assert flow.proto in PROTOS


def test_damaged_proxy_line() -> None:
    """A line with nothing or nonsense in it still makes a record."""
    assert from_proxy({}, None).layer == PROXY
    nonsense: dict[str, object] = dict.fromkeys(LINE, [{}])
    assert from_proxy(nonsense, None).layer == PROXY


def test_hosts_that_are_addresses() -> None:
    """Names are told from addresses of both families."""
    assert [enrich.is_address(text) for text in ("203.0.113.1", "2001:db8::1", "a.example", "")] == [
        True,
        True,
        False,
        False,
    ]
