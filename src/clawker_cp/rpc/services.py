"""
The services of this process, ready to be registered with a listener; nobody else needs the generated gRPC modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from clawker_cp.rpc.transport import TLS_1_3_ONLY  # noqa: F401 - first of all: the generated modules import grpc, too

# isort: split
from clawker_cp._proto.clawker.admin.v1.admin_pb2_grpc import add_AdminServiceServicer_to_server
from clawker_cp._proto.clawker.agent.v1.agent_pb2_grpc import add_AgentServiceServicer_to_server
from clawker_cp._proto.clawker.control.v1.control_pb2_grpc import add_ControlServiceServicer_to_server

Register = Callable[[Any], None]


def admin_service(servicer: Any) -> Register:
    """
    AdminService, answered by `servicer`.
    """
    return partial(add_AdminServiceServicer_to_server, servicer)


def control_service(servicer: Any) -> Register:
    """
    ControlService, answered by `servicer`.
    """
    return partial(add_ControlServiceServicer_to_server, servicer)


def agent_service(servicer: Any) -> Register:
    """
    AgentService, answered by `servicer`.
    """
    return partial(add_AgentServiceServicer_to_server, servicer)
