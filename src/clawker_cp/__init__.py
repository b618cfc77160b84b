"""
The control plane of a host that runs AI agents: egress decided in the kernel and by name.

The components that other programs use are importable from here by name; each is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clawker_cp.agents.watcher import AgentListCeiling, AgentWatcher, AgentWatcherOptions
    from clawker_cp.auth.clients import register_agent_client, register_cli_client
    from clawker_cp.auth.introspect import HydraIntrospector, IntrospectionResult, Introspector
    from clawker_cp.auth.ory import write_ory_configs
    from clawker_cp.auth.scopes import admin_method_scopes, agent_method_scopes, control_method_scopes
    from clawker_cp.processes.health import HealthCheck
    from clawker_cp.processes.manager import ManagedSubprocess, SubprocessManager
    from clawker_cp.rpc.admin import new_admin_server
    from clawker_cp.rpc.auth import AuthInterceptor
    from clawker_cp.runtime.startup import CPStartupOrchestrator

_MODULES = {
    "AgentListCeiling": "agents.watcher",
    "AgentWatcher": "agents.watcher",
    "AgentWatcherOptions": "agents.watcher",
    "AuthInterceptor": "rpc.auth",
    "CPStartupOrchestrator": "runtime.startup",
    "HealthCheck": "processes.health",
    "HydraIntrospector": "auth.introspect",
    "IntrospectionResult": "auth.introspect",
    "Introspector": "auth.introspect",
    "ManagedSubprocess": "processes.manager",
    "SubprocessManager": "processes.manager",
    "admin_method_scopes": "auth.scopes",
    "agent_method_scopes": "auth.scopes",
    "control_method_scopes": "auth.scopes",
    "new_admin_server": "rpc.admin",
    "register_agent_client": "auth.clients",
    "register_cli_client": "auth.clients",
    "write_ory_configs": "auth.ory",
}

__all__ = [
    "AgentListCeiling",
    "AgentWatcher",
    "AgentWatcherOptions",
    "AuthInterceptor",
    "CPStartupOrchestrator",
    "HealthCheck",
    "HydraIntrospector",
    "IntrospectionResult",
    "Introspector",
    "ManagedSubprocess",
    "SubprocessManager",
    "admin_method_scopes",
    "agent_method_scopes",
    "control_method_scopes",
    "new_admin_server",
    "register_agent_client",
    "register_cli_client",
    "write_ory_configs",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
