"""
One decision as a record, with the fields of the contract's `Flow` message.

Immutable; `as_mapping` and `encode_lines` are what clients get and the lines of `flows.jsonl`: proto
JSON with the original field names, zero values left out. Also the filter of those who watch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

KERNEL, DNS, PROXY = "LAYER_KERNEL", "LAYER_DNS", "LAYER_PROXY"
ALLOWED, DENIED = "FLOW_VERDICT_ALLOWED", "FLOW_VERDICT_DENIED"
BYPASSED, REDIRECTED = "FLOW_VERDICT_BYPASSED", "FLOW_VERDICT_REDIRECTED"
PROTOS = frozenset({"tcp", "udp", "icmp", "raw", "dns", "http", "https", "ws", "wss", "quic", "other"})


class Flow(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """
    Who asked for what, who decided, and why. `address` is text; times are Unix nanoseconds.

    `event_id` stays the first field: the search in files looks for it at the start of lines.
    """

    event_id: str = ""
    time_unix_ns: int = 0
    container_id: str = ""
    project: str = ""
    agent: str = ""
    layer: str = ""
    verdict: str = ""
    reason: str = ""
    rule_id: str = ""
    policy: int = 0
    proto: str = ""
    host: str = ""
    address: str = ""
    port: int = 0
    proxy_port: int = 0
    method: str = ""
    path: str = ""
    status: int = 0
    query_type: str = ""
    uid: int = 0
    pid: int = 0
    sequence: int = 0
    lost_before: int = 0
    hook: str = ""
    bytes_sent: int = 0
    bytes_received: int = 0
    duration_us: int = 0

    def as_mapping(self) -> dict[str, Any]:
        """
        The record as JSON values without zero values.
        """
        mapping: dict[str, Any] = msgspec.to_builtins(self)
        return mapping


class Loss(msgspec.Struct, frozen=True, gc=False):
    """Records that somebody does not get; `where`: "kernel", "queue", "subscriber"."""

    container_id: str
    where: str
    count: int


class FlowFilter(msgspec.Struct, frozen=True):
    """
    Which records somebody wants: fields AND, values within a field OR, empty = any.

    `container_ids` are resolved agents; `host_suffix` is a name and everything below it.
    """

    container_ids: frozenset[str] = frozenset()
    verdicts: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()
    reasons: frozenset[str] = frozenset()
    host_suffix: str = ""
    rule_ids: frozenset[str] = frozenset()
    protos: frozenset[str] = frozenset()

    def admits(self, flow: Flow) -> bool:
        """
        Whether a record is wanted.
        """
        suffix = self.host_suffix.lower().strip(".")
        return (
            (not self.container_ids or flow.container_id in self.container_ids)
            and (not self.verdicts or flow.verdict in self.verdicts)
            and (not self.layers or flow.layer in self.layers)
            and (not self.reasons or flow.reason in self.reasons)
            and (not suffix or flow.host == suffix or flow.host.endswith(f".{suffix}"))
            and (not self.rule_ids or flow.rule_id in self.rule_ids)
            and (not self.protos or flow.proto in self.protos)
        )


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Flow)


def encode(flow: Flow) -> bytes:
    """
    One line of `flows.jsonl`, without the newline.
    """
    return _ENCODER.encode(flow)


def encode_lines(flows: Sequence[Flow]) -> bytes:
    """
    Lines of `flows.jsonl`, each with its newline; one call into C for all.
    """
    return _ENCODER.encode_lines(flows)


def decode(line: bytes) -> Flow:
    """
    A record from its line; raises `msgspec.MsgspecError` for anything else.
    """
    return _DECODER.decode(line)


def printable(text: str) -> str:
    """
    Text that an agent chose, safe on a terminal: whatever is not printable is shown by its escape.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
