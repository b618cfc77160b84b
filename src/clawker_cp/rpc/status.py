"""
From our errors to gRPC statuses, with the reasons of contract 5.4 as `google.rpc.ErrorInfo`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from google.rpc import error_details_pb2, status_pb2

from clawker_cp.errors import (
    CapacityExceeded,
    ClawkerError,
    Conflict,
    DeadlineExceeded,
    Denied,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unsupported,
    descriptors_spent,
)
from clawker_cp.rpc.transport import grpc

Code = grpc.StatusCode
DOMAIN = "firewall.clawker.dev"
DETAILS_KEY = "grpc-status-details-bin"
# Clients refuse trailers above 8 KiB (grpc's default): message, percent-encoded, and once more in the details.
MESSAGE_LIMIT = 2600
METADATA_LIMIT = 900

# Reason -> code; when several apply the first in this order is the answer.
REASONS: Mapping[str, grpc.StatusCode] = {
    "CP_NOT_RUNNING": Code.UNAVAILABLE,
    "QUEUE_CLOSED": Code.UNAVAILABLE,
    "FIREWALL_NOT_INITIALIZED": Code.FAILED_PRECONDITION,
    "CONTAINER_GONE": Code.FAILED_PRECONDITION,
    "RULE_INVALID": Code.INVALID_ARGUMENT,
    "RULE_STORE_WRITE": Code.INTERNAL,
    "CERT_REGEN": Code.INTERNAL,
    "STACK_PROBE": Code.UNAVAILABLE,
    "CONFIG_REGEN": Code.INTERNAL,
    "ENVOY_RESTART": Code.INTERNAL,
    "COREDNS_RESTART": Code.INTERNAL,
    "ROUTE_SYNC": Code.INTERNAL,
    "STACK_UNHEALTHY": Code.UNAVAILABLE,
    "AGENT_RUNNING": Code.FAILED_PRECONDITION,
    "AGENTS_RUNNING": Code.FAILED_PRECONDITION,
    "AGENT_QUARANTINED": Code.FAILED_PRECONDITION,
    "AGENT_NOT_FOUND": Code.NOT_FOUND,
    "ENFORCEMENT_UNAVAILABLE": Code.UNAVAILABLE,
    "ENGINE_UNSUPPORTED": Code.FAILED_PRECONDITION,
    "CAPACITY": Code.RESOURCE_EXHAUSTED,
}
_RANKS = {reason: rank for rank, reason in enumerate(REASONS)}

_CATEGORIES: Sequence[tuple[type[ClawkerError], grpc.StatusCode]] = (
    (InvalidInput, Code.INVALID_ARGUMENT),
    (Unauthenticated, Code.UNAUTHENTICATED),
    (Denied, Code.PERMISSION_DENIED),
    (NotFound, Code.NOT_FOUND),
    (Conflict, Code.FAILED_PRECONDITION),
    (Unavailable, Code.UNAVAILABLE),
    (CapacityExceeded, Code.RESOURCE_EXHAUSTED),
    (Unsupported, Code.FAILED_PRECONDITION),
    (DeadlineExceeded, Code.DEADLINE_EXCEEDED),
)


@dataclass(frozen=True, slots=True)
class Status:
    """What a caller gets: code, message, and a reason with its facts for programs, if there is one."""

    code: grpc.StatusCode
    message: str
    reasons: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """
        The details as `grpc-status-details-bin`; nothing without a reason.
        """
        if not self.reasons:
            return ()
        details = status_pb2.Status(code=self.code.value[0], message=self.message)
        room = METADATA_LIMIT
        for reason, facts in self.reasons.items():
            info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
            for key, value in facts.items():
                kept = _cut(value, max(room - len(key), 0))
                room -= len(key) + len(kept.encode())
                if kept or not value:
                    info.metadata[key] = kept
            details.details.add().Pack(info)
        return ((DETAILS_KEY, details.SerializeToString()),)


def status_of(error: BaseException) -> Status | None:
    """
    The status of one of our errors, or of a group of nothing but them; None for anything else, which is a bug.
    Having no file descriptor left is nobody's bug.

    A known reason decides the code, else the category does; the message says what to do next. A group's
    first reason decides, all of them are told.
    """
    errors = [descriptors_spent(one) or one for one in leaves(error)]
    ours = [one for one in errors if isinstance(one, ClawkerError)]
    if not ours or len(ours) != len(errors):
        return None
    ours.sort(key=lambda one: _RANKS.get(one.code, len(_RANKS)))
    reasons: dict[str, Mapping[str, str]] = {}
    for one in ours:
        if one.code in REASONS:
            reasons.setdefault(one.code, _facts(one))
    messages = dict.fromkeys(_message(one) for one in ours)
    return Status(_code(ours[0]), _shorten("; ".join(messages)), reasons)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """
    The errors inside a group, or the error itself.
    """
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from leaves(one)
    else:
        yield error


def _code(error: ClawkerError) -> grpc.StatusCode:
    if error.code in REASONS:
        return REASONS[error.code]
    return next((code for kind, code in _CATEGORIES if isinstance(error, kind)), Code.INTERNAL)


def _message(error: ClawkerError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


def _facts(error: ClawkerError) -> Mapping[str, str]:
    return {"limit": error.limit, **error.details} if isinstance(error, CapacityExceeded) else error.details


def _shorten(message: str) -> str:
    # Printable ASCII travels as it is, anything else as three characters per byte.
    if len(quote(message, safe=_PLAIN)) <= MESSAGE_LIMIT:
        return message
    low, high = 0, len(message)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if len(quote(message[:middle], safe=_PLAIN)) <= MESSAGE_LIMIT - 9 else (low, middle - 1)
        )
    return message[:low] + "…"


_PLAIN = "".join(chr(code) for code in range(32, 127) if chr(code) != "%")


def _cut(text: str, room: int) -> str:
    return text.encode()[:room].decode(errors="ignore")
