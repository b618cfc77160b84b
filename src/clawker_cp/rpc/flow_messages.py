"""
Flow records, filters, losses and events between wire messages and the recording side's values. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.topics import Event
from clawker_cp.telemetry.flows import PROTOS, Flow, FlowFilter, Loss

_NUMBERS = (
    "time_unix_ns", "policy", "port", "proxy_port", "status", "uid", "pid", "sequence", "lost_before",
    "bytes_sent", "bytes_received", "duration_us",
)  # fmt: skip
_TEXTS = (
    "event_id", "container_id", "project", "agent", "reason", "rule_id", "proto", "host", "method", "path",
    "query_type", "hook",
)  # fmt: skip


def flow_message(flow: Flow) -> control_pb2.Flow:
    """
    A record as it goes over the wire; an address that is none is left out.
    """
    message = control_pb2.Flow(address=_octets(flow.address))
    message.layer = _number(control_pb2.Layer, flow.layer)
    message.verdict = _number(control_pb2.FlowVerdict, flow.verdict)
    for field in _NUMBERS:
        setattr(message, field, getattr(flow, field))
    for field in _TEXTS:
        text = getattr(flow, field)
        setattr(message, field, text if text.isascii() else text.encode("utf-8", "replace").decode())
    return message


def loss_message(loss: Loss) -> control_pb2.Loss:
    """
    Records that a watcher does not get.
    """
    return control_pb2.Loss(container_id=loss.container_id, where=loss.where, count=loss.count)


def filter_from(message: control_pb2.FlowFilter, container_ids: Iterable[str]) -> FlowFilter:
    """
    Read a filter whose agents were resolved already. Raises `InvalidInput` for a value that nothing can match.
    """
    unknown = sorted(set(message.protos) - PROTOS)
    if unknown:
        raise InvalidInput(f"filter.protos: {unknown[0]!r} is not one of {', '.join(sorted(PROTOS))}")
    return FlowFilter(
        container_ids=frozenset(container_ids),
        verdicts=frozenset(_word(control_pb2.FlowVerdict, number, "verdicts") for number in message.verdicts),
        layers=frozenset(_word(control_pb2.Layer, number, "layers") for number in message.layers),
        reasons=frozenset(message.reasons),
        host_suffix=message.host_suffix,
        rule_ids=frozenset(message.rule_ids),
        protos=frozenset(message.protos),
    )


def event_message(event: Event) -> control_pb2.Event:
    """
    One thing that happened.
    """
    return control_pb2.Event(
        time_unix_ns=event.time_unix_ns,
        topic=event.topic,
        name=event.name,
        container_id=event.container_id,
        project=event.project,
        agent=event.agent,
        fields=dict(event.fields),
    )


def _number(enum: Any, word: str) -> Any:
    return enum.Value(word) if word in enum.keys() else 0  # noqa: SIM118 - an enum wrapper is no mapping


def _word(enum: Any, number: int, field: str) -> str:
    if number == 0 or number not in enum.values():
        raise InvalidInput(f"filter.{field}: {number} is not a known value")
    return str(enum.Name(number))


def _octets(address: str) -> bytes:
    try:
        return ipaddress.ip_address(address).packed
    except ValueError:
        return b""
