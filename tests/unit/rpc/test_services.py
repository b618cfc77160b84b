"""The services of this process and the scopes of their methods belong together."""

from __future__ import annotations

from clawker_cp.auth.scopes import admin_method_scopes, agent_method_scopes, control_method_scopes
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.server import served_methods
from clawker_cp.rpc.services import admin_service, agent_service, control_service
from clawker_cp.testing.rpc_world import Authority


class Everything:
    """A servicer of any service."""

    def __getattr__(self, name: str) -> object:
        return lambda request, context: None


def test_each_service_serves_what_its_map_names() -> None:
    """Neither a method without a scope nor a scope without a method."""
    servicer = Everything()
    assert served_methods([admin_service(servicer)]) == set(admin_method_scopes())
    assert served_methods([control_service(servicer)]) == set(control_method_scopes())
    assert served_methods([agent_service(servicer)]) == set(agent_method_scopes())


async def test_the_operators_listener_may_start() -> None:
    """Its two maps together leave no method of its two services out; one alone does."""
    servicer = Everything()
    served = served_methods([admin_service(servicer), control_service(servicer)])
    both = AuthInterceptor(Authority(), {**admin_method_scopes(), **control_method_scopes()})
    assert both.unmapped(served) == []
    assert len(AuthInterceptor(Authority(), admin_method_scopes()).unmapped(served)) == len(control_method_scopes())
