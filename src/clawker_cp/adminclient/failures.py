"""
What a call failed with: status, reason and facts of the server, and what a person can do about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from clawker_cp.errors import ClawkerError

DETAILS_KEY = "grpc-status-details-bin"
REMEDIES: Mapping[str, str] = {
    "QUEUE_CLOSED": "the control plane is shutting down or busy; try again in a moment",
    "FIREWALL_NOT_INITIALIZED": "`clawkerctl firewall up` turns the firewall on",
    "CONTAINER_GONE": "`clawkerctl agents` lists what runs",
    "RULE_INVALID": "nothing was changed; correct the rule, docs/rules.md has the form",
    "RULE_STORE_WRITE": "nothing was changed; `clawkerctl firewall remove --all` starts unreadable files over",
    "CERT_REGEN": "is there room on the disk? then `clawkerctl firewall reload`",
    "STACK_PROBE": "`clawkerctl status` says which part does not answer",
    "CONFIG_REGEN": "is there room on the disk? then `clawkerctl firewall reload`",
    "ENVOY_RESTART": "`clawkerctl status` has the cause; it is tried again",
    "COREDNS_RESTART": "`clawkerctl status` has the cause; it is tried again",
    "STACK_UNHEALTHY": "`clawkerctl status` says which part; the control plane keeps trying",
    "ROUTE_SYNC": "`clawkerctl status`, then `clawkerctl firewall sync-routes`",
    "AGENT_RUNNING": "stop it first, or use `clawkerctl bypass` for a limited time",
    "AGENTS_RUNNING": "stop them first, or use `clawkerctl bypass` for a limited time",
    "AGENT_QUARANTINED": "`clawkerctl release` ends the quarantine",
    "AGENT_NOT_FOUND": "`clawkerctl agents` lists what runs",
    "ENFORCEMENT_UNAVAILABLE": "nothing can be opened now; `clawkerctl status` says why, and denied stays denied",
    "ENGINE_UNSUPPORTED": "this control plane runs another engine; `clawkerctl status` names it",
    "CAPACITY": "a bound is reached; the message names it",
}
# Refusals that carry no reason, by status.
_REFUSED: Mapping[str, str] = {
    "UNAUTHENTICATED": "is this the auth tree of that control plane, and is its clock ours? `clawkerctl auth status`",
    "PERMISSION_DENIED": "is cli/client.pem the one of that control plane? `clawkerctl auth status`",
}
_UNREACHABLE = "is the control plane running? `clawker-cp serve`"
_UNTRUSTED = "is this the auth tree of that control plane? `clawkerctl auth status`"


class RpcFailed(ClawkerError):
    """
    A call that was refused or did not come through. `status` is the gRPC code's name, `code` the server's reason.
    """

    def __init__(self, status: str, message: str, reason: str = "", details: Mapping[str, str] | None = None) -> None:
        hint = REMEDIES.get(reason) or (None if reason else _REFUSED.get(status))
        if hint is None and status == "UNAVAILABLE" and not reason:
            hint = _UNTRUSTED if "CERTIFICATE_VERIFY_FAILED" in message else _UNREACHABLE
        super().__init__(message or status, code=reason or status, hint=hint, details=details)
        self.status = status


def failure_of(error: grpc.aio.AioRpcError) -> RpcFailed:
    """
    Read a failed call. Details that cannot be parsed are left out.
    """
    reason, facts = "", dict[str, str]()
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            reason, facts = _first_reason(value)
    return RpcFailed(error.code().name, error.details() or "", reason, facts)


def _first_reason(data: bytes) -> tuple[str, dict[str, str]]:
    status: Any = status_pb2.Status()
    try:
        status.ParseFromString(data)
        for detail in status.details:
            info: Any = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                return info.reason, dict(info.metadata)
    except DecodeError:
        return "", {}
    return "", {}
