"""ControlService is the sum of its parts, and every RPC of the service has one."""

from __future__ import annotations

import pytest

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.rpc.control import ControlServicer
from clawker_cp.rpc.control_agents import AgentRpcs
from clawker_cp.rpc.control_flows import FlowRpcs
from clawker_cp.rpc.control_rules import RuleRpcs
from clawker_cp.rpc.control_sandboxes import SandboxRpcs


def test_every_rpc_is_offered_by_exactly_one_part() -> None:
    """The parts' methods are those of the service's descriptor, no more and no less."""
    offered = [
        name for part in (RuleRpcs, FlowRpcs, AgentRpcs, SandboxRpcs) for name in vars(part) if name[0].isupper()
    ]
    service = control_pb2.DESCRIPTOR.services_by_name["ControlService"]
    assert sorted(offered) == sorted(method.name for method in service.methods)


def test_two_parts_with_one_method_are_refused() -> None:
    """A wiring mistake is found at construction."""

    class Part:
        def GetStatus(self) -> None: ...

    with pytest.raises(TypeError, match="GetStatus"):
        ControlServicer(Part(), Part())
    assert ControlServicer(Part()).GetStatus is not None  # type: ignore[attr-defined]
