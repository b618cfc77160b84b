"""
The services of this process, ready to be registered with a listener; nobody else needs the generated gRPC modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from clawker_cp.rpc.transport import TLS_1_3_ONLY  # noqa: F401 - first of all: the generated modules import grpc, too

# isort: split
from grpc_health.v1.health import aio as health
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

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


class HealthService:
    """
    grpc.health.v1 for the services of one listener: unknown until `serve`, NOT_SERVING from `leave` on.

    The server as a whole, the name "", serves only while nothing critical has failed. Calling the instance registers
    it. `Watch` streams end with the listener.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._names = ("", *services)
        self._servicer = health.HealthServicer()

    def __call__(self, server: Any) -> None:
        add_HealthServicer_to_server(self._servicer, server)

    async def serve(self) -> None:
        """
        Say that every service of the listener serves.
        """
        for name in self._names:
            await self._servicer.set(name, HealthCheckResponse.SERVING)

    async def tell(self, *, healthy: bool) -> None:
        """
        Say how the server as a whole is; too late after `leave`.
        """
        await self._servicer.set("", HealthCheckResponse.SERVING if healthy else HealthCheckResponse.NOT_SERVING)

    async def leave(self) -> None:
        """
        Say that no service serves any more, for good.
        """
        await self._servicer.enter_graceful_shutdown()
