"""
The ready gate: until the control plane is ready only its boot methods are served (contract 5.1).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from clawker_cp.rpc.interceptors.handlers import ending
from clawker_cp.rpc.transport import grpc

BOOT_METHODS = frozenset(
    {
        "/clawker.admin.v1.AdminService/GetSystemTime",
        "/clawker.admin.v1.AdminService/WatchSOS",
        "/clawker.control.v1.ControlService/GetStatus",
    }
)
STARTING = "control plane is starting up"


class ReadyGate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """
    Refuses everything but `boot_methods` with FAILED_PRECONDITION while `is_ready` says no.

    `is_ready` is asked at the start of every call and must not block.
    """

    def __init__(self, is_ready: Callable[[], bool], boot_methods: frozenset[str] = BOOT_METHODS) -> None:
        self._is_ready = is_ready
        self._boot_methods = boot_methods
        self._refusal = ending(_refuse)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if self._is_ready() or details.method in self._boot_methods:
            return await continuation(details)
        return self._refusal


async def _refuse(context: Any) -> None:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, STARTING)
