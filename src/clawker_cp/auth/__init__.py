"""
Who may call what: bearer tokens, introspection, scopes. Knows no gRPC.
"""

from clawker_cp.auth.introspect import HydraIntrospector, IntrospectionResult, Introspector
from clawker_cp.auth.scopes import admin_method_scopes, agent_method_scopes, control_method_scopes

__all__ = [
    "HydraIntrospector",
    "IntrospectionResult",
    "Introspector",
    "admin_method_scopes",
    "agent_method_scopes",
    "control_method_scopes",
]
