"""Whatever a handler raises becomes a status; a bug is told to the log alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import status_pb2

from clawker_cp.errors import ClawkerError, Conflict, InvalidInput, NotFound
from clawker_cp.rpc.auth import AuthInterceptor
from clawker_cp.rpc.interceptors.recovery import Recovery
from clawker_cp.testing.rpc_world import (
    CHAT,
    MANY,
    ONE,
    SCOPES,
    SUM,
    Authority,
    Kinds,
    Log,
    RpcWorld,
    active,
    bearer,
    call,
    outcome,
)

GOOD = bearer("good")
EVERY_KIND = pytest.mark.parametrize("method", [ONE, MANY, SUM, CHAT])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RpcWorld:
    return RpcWorld(tmp_path_factory.mktemp("recovery"))


def auth() -> AuthInterceptor:
    return AuthInterceptor(Authority(good=active()), SCOPES)


def raising(make: Callable[[], BaseException]) -> Kinds:
    async def fail(_name: str, _context: Any) -> None:
        raise make()

    return Kinds(fail)


@EVERY_KIND
async def test_a_bug_tells_its_caller_nothing(world: RpcWorld, method: str) -> None:
    """INTERNAL and two words; what happened is in the log, and the next call is served."""
    log = Log()
    kinds = raising(lambda: ValueError("secret of the house"))
    async with world.serving(auth(), kinds, log=log) as (_server, channel):
        assert await outcome(channel, method, GOOD) == ("INTERNAL", "internal error")
        kinds.on_call = None
        assert await outcome(channel, method, GOOD) == ("OK", "")
    ((level, event, fields),) = log.lines
    assert (level, event, fields["method"], fields["cause"]) == ("error", "grpc_handler_panic", method, "ValueError")
    assert "secret of the house" in str(fields["exc_info"])


@EVERY_KIND
async def test_our_errors_are_statuses_with_reasons(world: RpcWorld, method: str) -> None:
    """A category without a reason has its code; one with a reason has it in the details; neither is a bug."""
    log = Log()
    kinds = raising(lambda: NotFound("sandbox 12 is not known", hint="list them"))
    async with world.serving(auth(), kinds, log=log) as (_server, channel):
        assert await outcome(channel, method, GOOD) == ("NOT_FOUND", "sandbox 12 is not known; list them")
        kinds.on_call = raising(lambda: Conflict("gone", code="CONTAINER_GONE")).on_call
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(channel, method, GOOD)
    details = dict(raised.value.trailing_metadata() or ())["grpc-status-details-bin"]
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert status_pb2.Status.FromString(details).message == "gone"
    assert log.lines == []


async def test_an_internal_failure_of_ours_is_told_and_logged(world: RpcWorld) -> None:
    """Its message was written for people; its cause is in the log."""
    log = Log()
    kinds = raising(lambda: ClawkerError("the rules file is not writable", code="RULE_STORE_WRITE"))
    async with world.serving(auth(), kinds, log=log) as (_server, channel):
        assert await outcome(channel, ONE, GOOD) == ("INTERNAL", "the rules file is not writable")
    assert log.events() == ["rpc_failed"]


async def test_errors_of_a_task_group_are_seen_through(world: RpcWorld) -> None:
    """A handler may use groups; what failed inside counts."""
    kinds = raising(lambda: ExceptionGroup("tasks", [InvalidInput("dst: empty", code="RULE_INVALID")]))
    async with world.serving(auth(), kinds) as (_server, channel):
        assert await outcome(channel, ONE, GOOD) == ("INVALID_ARGUMENT", "dst: empty")


@EVERY_KIND
async def test_a_handler_may_abort_by_itself(world: RpcWorld, method: str) -> None:
    """Its status stays, also when it aborts inside a group; nothing is logged."""
    log = Log()

    async def abort(_name: str, context: Any) -> None:
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, "there is one")

    async def abort_in_group(name: str, context: Any) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(abort(name, context))

    for behaviour in (abort, abort_in_group):
        async with world.serving(auth(), Kinds(behaviour), log=log) as (_server, channel):
            assert await outcome(channel, method, GOOD) == ("ALREADY_EXISTS", "there is one")
    assert log.lines == []


@EVERY_KIND
async def test_something_cancelled_under_a_handler_is_a_bug(world: RpcWorld, method: str) -> None:
    """The caller is not left waiting when what the handler waited for was cancelled by others."""
    log = Log()

    async def wait(_name: str, _context: Any) -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async with world.serving(auth(), Kinds(wait), log=log) as (_server, channel):
        assert await outcome(channel, method, GOOD, timeout=5) == ("INTERNAL", "internal error")
    assert log.events() == ["grpc_handler_panic"]


async def test_a_caller_that_leaves_cancels_its_handler(world: RpcWorld) -> None:
    """And that is no failure."""
    log, entered, ended = Log(), asyncio.Event(), asyncio.Event()

    async def wait(_name: str, _context: Any) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with world.serving(auth(), Kinds(wait), log=log) as (_server, channel), asyncio.TaskGroup() as group:
        task = group.create_task(outcome(channel, ONE, GOOD))
        await entered.wait()
        task.cancel()
        async with asyncio.timeout(5):
            await ended.wait()
    assert log.lines == []


async def test_a_response_that_cannot_be_serialised_is_a_bug_like_any_other(world: RpcWorld) -> None:
    """grpc would tell the caller the exception's words."""
    log = Log()

    class Wrong(Kinds):
        async def one(self, request: StringValue, context: Any) -> Any:
            return "a text, not a message"

    async with world.serving(auth(), Wrong(), log=log) as (_server, channel):
        assert await outcome(channel, ONE, GOOD) == ("INTERNAL", "internal error")
    assert log.events() == ["grpc_handler_panic"]


async def test_an_interceptor_below_that_fails_is_recovered(world: RpcWorld) -> None:
    """Before any handler was chosen, too."""
    log = Log()

    class Broken(grpc.aio.ServerInterceptor):  # type: ignore[misc]
        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            raise KeyError("bug")

    async with world.serving(auth(), identity=[Broken()], log=log) as (_server, channel):
        assert await outcome(channel, ONE, GOOD) == ("INTERNAL", "internal error")
    assert log.events() == ["grpc_handler_panic"]


async def test_every_served_call_is_observed(world: RpcWorld) -> None:
    """Method, status and duration; an observer that fails harms nobody."""
    seen: list[tuple[str, str]] = []

    def observe(method: str, code: str, seconds: float) -> None:
        assert 0 <= seconds < 10
        seen.append((method, code))
        raise ValueError("observer")

    log = Log()
    kinds = Kinds()
    async with world.serving(auth(), kinds, observe=observe, log=log) as (_server, channel):
        await outcome(channel, ONE, GOOD)
        await outcome(channel, MANY, GOOD)
        await outcome(channel, ONE)
        kinds.on_call = raising(lambda: KeyError("x")).on_call
        await outcome(channel, ONE, GOOD)
    assert seen == [(ONE, "OK"), (MANY, "OK"), (ONE, "UNAUTHENTICATED"), (ONE, "INTERNAL")]
    assert log.events().count("rpc_observe_failed") == 4


async def test_a_method_nobody_serves_stays_unimplemented() -> None:
    """Recovery alone changes nothing about it."""
    server = grpc.aio.server(interceptors=[Recovery()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert (await outcome(channel, ONE))[0] == "UNIMPLEMENTED"
    finally:
        await server.stop(0)
