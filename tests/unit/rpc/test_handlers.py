"""Handlers of every style behind one check."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

from clawker_cp.rpc.interceptors.handlers import call_of, ending, guarded


class Context:
    """Collects what a handler writes, and how it was aborted."""

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.aborted: tuple[Any, str] | None = None

    async def write(self, message: Any) -> None:
        self.written.append(message)

    async def abort(self, code: Any, details: str) -> None:
        self.aborted = (code, details)
        raise grpc.aio.AbortError


async def coroutine(request: Any, _context: Any) -> str:
    return f"got {request}"


def function(request: Any, _context: Any) -> str:
    return f"got {request}"


class Object:
    async def __call__(self, request: Any, _context: Any) -> str:
        return f"got {request}"


@pytest.mark.parametrize("style", [coroutine, function, Object()], ids=["coroutine", "function", "object"])
async def test_single_responses_of_every_style(style: Any) -> None:
    """A coroutine, a plain function and a callable object answer alike."""
    assert await call_of(grpc.unary_unary_rpc_method_handler(style))("a", Context()) == "got a"


async def generator(request: Any, _context: Any) -> AsyncIterator[str]:
    for character in request:
        yield character


def plain_generator(request: Any, _context: Any) -> Iterator[str]:
    yield from request


async def writer(request: Any, context: Any) -> None:
    for character in request:
        await context.write(character)


def late_writer(request: Any, context: Any) -> Any:
    return writer(request, context)


@pytest.mark.parametrize("style", [generator, plain_generator, writer, late_writer])
async def test_response_streams_of_every_style(style: Any) -> None:
    """Generators and the reader-writer style send the same."""
    context = Context()
    await call_of(grpc.unary_stream_rpc_method_handler(style))("abc", context)
    assert context.written == ["a", "b", "c"]


async def test_a_generator_is_closed_when_its_call_is_cancelled() -> None:
    """Its cleanup runs before the cancelled call is over."""
    closed, waiting = [], asyncio.Event()

    async def endless(_request: Any, _context: Any) -> AsyncIterator[str]:
        try:
            yield "a"
            waiting.set()
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    context = Context()
    call = call_of(grpc.unary_stream_rpc_method_handler(endless))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(call("x", context))
        await waiting.wait()
        task.cancel()
    assert closed == [True] and context.written == ["a"]


async def test_a_generator_is_closed_when_its_caller_is_gone() -> None:
    """When a message cannot be written the generator's cleanup has run before the call is over."""
    closed = []

    async def endless(_request: Any, _context: Any) -> AsyncIterator[str]:
        try:
            while True:
                yield "a"
        finally:
            closed.append(True)

    class Gone(Context):
        async def write(self, message: Any) -> None:
            raise ConnectionResetError

    running: list[AsyncIterator[str]] = []  # referred to, so that it is not the collector that closes it

    def begin(request: Any, context: Any) -> AsyncIterator[str]:
        running.append(endless(request, context))
        return running[0]

    with pytest.raises(ConnectionResetError):
        await call_of(grpc.unary_stream_rpc_method_handler(begin))("x", Gone())
    assert closed == [True]


async def test_the_check_comes_before_the_request_is_parsed() -> None:
    """A check that passes lets the parsed request through; one that raises keeps parser and handler untouched."""
    parsed: list[bytes] = []

    def parse(data: bytes) -> str:
        parsed.append(data)
        return data.decode()

    handler = grpc.unary_unary_rpc_method_handler(coroutine, request_deserializer=parse)
    assert await guarded(handler, lambda _context: None).unary_unary(b"a", Context()) == "got a"

    async def refuse(context: Any) -> None:
        await context.abort("code", "no")

    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await guarded(handler, refuse).unary_unary(b"b", context)
    assert parsed == [b"a"] and context.aborted == ("code", "no")


async def test_what_cannot_be_parsed_is_the_callers_fault() -> None:
    """Whatever the parser raises, the answer is INVALID_ARGUMENT and repeats nothing."""
    handler = grpc.unary_unary_rpc_method_handler(coroutine, request_deserializer=lambda data: data.decode("ascii"))
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await guarded(handler, lambda _context: None).unary_unary(b"\xff", context)
    assert context.aborted == (grpc.StatusCode.INVALID_ARGUMENT, "malformed request")


@pytest.mark.parametrize("requests", [False, True])
@pytest.mark.parametrize("responses", [False, True])
def test_the_kind_stays(requests: bool, responses: bool) -> None:
    """A wrapped handler is of the same kind, with the same serialiser, and reads streams as before."""
    kind = f"{'stream' if requests else 'unary'}_{'stream' if responses else 'unary'}"
    factory = getattr(grpc, f"{kind}_rpc_method_handler")
    handler = factory(coroutine, request_deserializer=bytes.decode, response_serializer=str.encode)
    wrapped = guarded(handler, lambda _context: None)
    assert (wrapped.request_streaming, wrapped.response_streaming) == (requests, responses)
    assert wrapped.response_serializer == str.encode
    assert wrapped.request_deserializer == (bytes.decode if requests else None)


async def test_an_ending_reads_nothing() -> None:
    """It fits any kind of call and only ends it."""

    async def end(context: Any) -> None:
        await context.abort("code", "over")

    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await ending(end).stream_stream(None, context)
    assert context.aborted == ("code", "over")
