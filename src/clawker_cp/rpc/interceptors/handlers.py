"""
Method handlers wrapped: the four kinds of RPC reduced to one coroutine each.

Interceptors build on this and see no difference between `async def`, asynchronous generators and the
reader-writer style of grpc.aio.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from clawker_cp.rpc.transport import grpc

Call = Callable[[Any, Any], Coroutine[Any, Any, Any]]
Admit = Callable[[Any], Awaitable[None] | None]

_FACTORIES = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_BEHAVIOURS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}
MALFORMED = "malformed request"


def call_of(handler: Any) -> Call:
    """
    The handler's behaviour as a coroutine function: returns the response, or writes the responses itself.

    A generator is closed when the call ends early, also by cancellation.
    """
    behaviour = getattr(handler, _BEHAVIOURS[bool(handler.request_streaming), bool(handler.response_streaming)])
    if inspect.iscoroutinefunction(behaviour):
        return behaviour  # type: ignore[no-any-return]

    async def answer(request: Any, context: Any) -> Any:
        result = behaviour(request, context)
        return await result if inspect.isawaitable(result) else result

    async def answers(request: Any, context: Any) -> None:
        result = behaviour(request, context)
        if inspect.isawaitable(result):
            await result
            return
        if not hasattr(result, "__aiter__"):
            for message in result:
                await context.write(message)
            return
        async with aclosing(result) as messages:
            async for message in messages:
                await context.write(message)

    return answers if handler.response_streaming else answer


def rebuilt(handler: Any, call: Call, *, deserializer: Any, serializer: Any) -> Any:
    """
    A handler of the same kind with another behaviour.
    """
    factory = _FACTORIES[bool(handler.request_streaming), bool(handler.response_streaming)]
    return factory(call, request_deserializer=deserializer, response_serializer=serializer)


def guarded(handler: Any, admit: Admit) -> Any:
    """
    The handler behind a check that returns None, returns something to await, or aborts there.

    A request is parsed after the check: whoever may not pass has nothing of his read.
    """
    call = call_of(handler)
    parse = None if handler.request_streaming else handler.request_deserializer

    async def checked(request: Any, context: Any) -> Any:
        waiting = admit(context)
        if waiting is not None:
            await waiting
        if parse is not None:
            try:
                request = parse(request)
            except Exception:  # noqa: BLE001 - a parser may raise anything at what a stranger sent
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, MALFORMED)
        return await call(request, context)

    deserializer = handler.request_deserializer if handler.request_streaming else None
    return rebuilt(handler, checked, deserializer=deserializer, serializer=handler.response_serializer)


def ending(end: Callable[[Any], Awaitable[None]]) -> Any:
    """
    A handler for any kind of call that reads nothing and ends it; `end` has to abort.
    """

    async def stop(_requests: Any, context: Any) -> None:
        await end(context)

    return grpc.stream_stream_rpc_method_handler(stop)
