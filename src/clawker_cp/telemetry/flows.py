"""
One decision as a record, with the fields of the contract's `Flow` message.

Immutable; `as_json` is the line of `flows.jsonl` and what clients get: proto JSON with the
original field names, zero values left out.
"""

from __future__ import annotations

from typing import Any

import msgspec

KERNEL, DNS, PROXY = "LAYER_KERNEL", "LAYER_DNS", "LAYER_PROXY"
ALLOWED, DENIED = "FLOW_VERDICT_ALLOWED", "FLOW_VERDICT_DENIED"
BYPASSED, REDIRECTED = "FLOW_VERDICT_BYPASSED", "FLOW_VERDICT_REDIRECTED"


class Flow(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """
    Who asked for what, who decided, and why. `address` is text; times are Unix nanoseconds.
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


_ENCODER = msgspec.json.Encoder()


def encode(flow: Flow) -> bytes:
    """
    One line of `flows.jsonl`, without the newline.
    """
    return _ENCODER.encode(flow)
