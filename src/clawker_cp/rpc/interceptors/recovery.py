"""
The outermost interceptor: whatever happens below becomes a status, and a bug tells the caller nothing.

`ClawkerError` -> its status with its reason (`rpc.status`); a message that cannot be parsed -> INVALID_ARGUMENT;
anything else -> INTERNAL `internal error`, event `grpc_handler_panic` with the details.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from google.protobuf.message import DecodeError

from clawker_cp.rpc.interceptors.handlers import MALFORMED, call_of, ending, rebuilt
from clawker_cp.rpc.status import leaves, status_of
from clawker_cp.rpc.transport import grpc

INTERNAL_MESSAGE = "internal error"
Observe = Callable[[str, str, float], None]


class Recovery(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """
    Turns errors into statuses. `observe` gets method, status name and seconds of every call that was served; it
    must not block, and what it raises is dropped.
    """

    def __init__(self, *, log: Any = None, observe: Observe | None = None) -> None:
        self._log = structlog.get_logger() if log is None else log
        self._observe = observe
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        try:
            handler = await continuation(details)
            if handler is None:
                return None
            known = self._wrapped.get(details.method)
            if known is not None and known[0] is handler:
                return known[1]
            wrapped = self._wrap(handler, details.method)
        except Exception as error:  # noqa: BLE001 - the RPC boundary
            self._panic(details.method, error)
            return ending(_internal)
        # Only served methods have a handler of their own that stays; a refusal is made for one call.
        if known is not None or len(self._wrapped) < 1024:
            self._wrapped[details.method] = (handler, wrapped)
        return wrapped

    def _wrap(self, handler: Any, method: str) -> Any:
        call = call_of(handler)
        # A response is serialised here and not by grpc, which would tell the caller what went wrong.
        serialize = None if handler.response_streaming else handler.response_serializer

        async def recovered(request: Any, context: Any) -> Any:
            begun = time.monotonic()
            try:
                response = await call(request, context)
                return response if serialize is None else serialize(response)
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Nobody cancelled this call: something it waited for was cancelled under it.
                await self._fail(method, error, context)
            except Exception as error:  # noqa: BLE001 - the RPC boundary
                await self._fail(method, error, context)
            finally:
                self._seen(method, context, time.monotonic() - begun)

        serializer = handler.response_serializer if handler.response_streaming else None
        return rebuilt(handler, recovered, deserializer=handler.request_deserializer, serializer=serializer)

    async def _fail(self, method: str, error: BaseException, context: Any) -> None:
        aborted = next((one for one in leaves(error) if isinstance(one, grpc.aio.AbortError)), None)
        if aborted is not None:
            raise aborted  # its status is set already
        if isinstance(error, DecodeError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED)
        status = status_of(error)
        if status is None:
            self._panic(method, error)
            await _internal(context)
            return
        if status.code is grpc.StatusCode.INTERNAL:
            self._log.error("rpc_failed", method=method, cause=status.message, exc_info=error)
        await context.abort(status.code, status.message, status.trailing_metadata())

    def _panic(self, method: str, error: BaseException) -> None:
        self._log.error("grpc_handler_panic", method=method, cause=type(error).__name__, exc_info=error)

    def _seen(self, method: str, context: Any, seconds: float) -> None:
        if self._observe is None:
            return
        try:
            code = context.code()
            name = "OK" if not code else code.name if isinstance(code, grpc.StatusCode) else _NAMES.get(code, "UNKNOWN")
            self._observe(method, name, seconds)
        except Exception as error:  # noqa: BLE001 - reporting never fails a call (I12)
            self._log.warning("rpc_observe_failed", method=method, cause=type(error).__name__)


_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


async def _internal(context: Any) -> None:
    await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE)
