"""Every method of every served service has its scope, by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import pytest

import clawker_cp._proto as _proto
import clawker_cp.auth as auth
from clawker_cp._proto.clawker.admin.v1 import admin_pb2
from clawker_cp._proto.clawker.agent.v1 import agent_pb2
from clawker_cp._proto.clawker.control.v1 import control_pb2


@pytest.mark.parametrize(
    ("scopes", "module", "service"),
    [
        (auth.admin_method_scopes(), admin_pb2, "AdminService"),
        (auth.control_method_scopes(), control_pb2, "ControlService"),
        (auth.agent_method_scopes(), agent_pb2, "AgentService"),
    ],
)
def test_every_rpc_is_mapped_and_nothing_else(scopes: Mapping[str, str], module: object, service: str) -> None:
    """The map and the service's descriptor name the same methods, and no scope is empty."""
    descriptor = module.DESCRIPTOR.services_by_name[service]  # type: ignore[attr-defined]
    served = {f"/{descriptor.full_name}/{method.name}" for method in descriptor.methods}
    assert set(scopes) == served
    assert all(scopes.values())


def test_no_service_is_forgotten() -> None:
    """Every service of every generated module is mapped, but for the one that agents serve and we call."""
    found = set()
    for path in Path(_proto.__path__[0]).rglob("*_pb2.py"):
        inner = path.relative_to(_proto.__path__[0]).with_suffix("")
        module = importlib.import_module(".".join(["clawker_cp._proto", *inner.parts]))
        for service in module.DESCRIPTOR.services_by_name.values():
            found |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    mapped = {**auth.admin_method_scopes(), **auth.control_method_scopes(), **auth.agent_method_scopes()}
    assert found - set(mapped) == {"/clawker.clawkerd.v1.ClawkerdService/Session"}


def test_only_the_clock_is_public() -> None:
    """GetSystemTime alone needs no token; registering needs the agents' scope; the rest is admin's."""
    scopes = {**auth.admin_method_scopes(), **auth.control_method_scopes(), **auth.agent_method_scopes()}
    assert [name for name, scope in scopes.items() if scope == "public"] == [
        "/clawker.admin.v1.AdminService/GetSystemTime"
    ]
    assert scopes["/clawker.agent.v1.AgentService/Register"] == "agent:self:register"
    assert set(scopes.values()) == {"admin", "public", "agent:self:register"}


def test_the_maps_cannot_be_changed() -> None:
    """A scope is not taken away at run time."""
    with pytest.raises(TypeError):
        auth.admin_method_scopes()["/x"] = "public"  # type: ignore[index]
