"""
Which scope each method needs (contract 3.2). A method that is not here is refused (I10).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ADMIN = "admin"
REGISTER = "agent:self:register"
PUBLIC = "public"  # mTLS and the listener's CN pin, no token; an explicit word, never an empty value

CLI_CLIENT = "clawker-cli"
AGENT_CLIENT = "clawker-agent"

_ADMIN_METHODS = (
    "FirewallInit",
    "FirewallRemove",
    "FirewallEnable",
    "FirewallDisable",
    "FirewallBypass",
    "FirewallAddRules",
    "FirewallRemoveRule",
    "FirewallListRules",
    "FirewallReload",
    "FirewallStatus",
    "FirewallRotateCA",
    "FirewallSyncRoutes",
    "FirewallResolveHostname",
    "ListAgents",
    "WatchSOS",
)
_CONTROL_METHODS = (
    "GetStatus",
    "PutRules",
    "DeleteRules",
    "ListRules",
    "GetEffectiveRules",
    "Grant",
    "Check",
    "Explain",
    "WatchFlows",
    "WatchEvents",
    "ListSessions",
    "Quarantine",
    "Release",
    "RevokeToken",
    "CreateSandbox",
    "ListSandboxes",
    "RemoveSandbox",
    "AttachSandbox",
)


def admin_method_scopes() -> Mapping[str, str]:
    """
    Full method name -> scope, every RPC of AdminService.
    """
    service = "/clawker.admin.v1.AdminService/"
    scopes = {service + method: ADMIN for method in _ADMIN_METHODS}
    return MappingProxyType({**scopes, service + "GetSystemTime": PUBLIC})


def control_method_scopes() -> Mapping[str, str]:
    """
    Full method name -> scope, every RPC of ControlService.
    """
    return MappingProxyType({f"/clawker.control.v1.ControlService/{method}": ADMIN for method in _CONTROL_METHODS})


def agent_method_scopes() -> Mapping[str, str]:
    """
    Full method name -> scope, every RPC of AgentService: an agent attests its own identity, once per container.
    """
    return MappingProxyType({"/clawker.agent.v1.AgentService/Register": REGISTER})


def health_method_scopes() -> Mapping[str, str]:
    """
    Full method name -> scope of the gRPC health service: whoever the listener's certificate check admits.
    """
    return MappingProxyType({f"/grpc.health.v1.Health/{method}": PUBLIC for method in ("Check", "Watch", "List")})
