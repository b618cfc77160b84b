"""
ControlService, the part about sandboxes: create, list, remove, and the two-way stream of an attachment.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import orjson

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.engines.base import Limits, Mount, Publish, Sandbox, SandboxSpec
from clawker_cp.errors import ClawkerError, Conflict, InvalidInput

GRACE_S = 10
MAX_GRACE_S = 600
MAX_WORDS = 4096
FIRST_MESSAGE_S = 5.0


class RowLike(Protocol):
    """One sandbox of the history."""

    @property
    def id(self) -> str: ...
    @property
    def spec(self) -> str: ...
    @property
    def state(self) -> int: ...
    @property
    def created_at(self) -> int: ...
    @property
    def started_at(self) -> int: ...
    @property
    def finished_at(self) -> int: ...
    @property
    def exit_code(self) -> int: ...


class Sandboxes(Protocol):
    """`wiring.sandbox_service`."""

    async def create(self, spec: SandboxSpec, *, auto_remove: bool) -> tuple[RowLike, Sandbox]: ...
    def listed(self, *, everything: bool) -> Sequence[tuple[RowLike, Sandbox | None]]: ...
    async def remove(self, reference: str, *, force: bool, grace_s: float) -> None: ...
    def attach(self, reference: str) -> AbstractAsyncContextManager[Any]: ...


class SandboxRpcs:
    """
    The RPCs. `ids` gives uid and gid for who asks for none; `policy_of` the policy of a sandbox by its id.
    """

    def __init__(
        self,
        sandboxes: Sandboxes | None,
        *,
        ids: Callable[[], tuple[int, int]],
        policy_of: Callable[[str], int],
        inbound: str = "host",
    ) -> None:
        self._sandboxes = sandboxes
        self._ids = ids
        self._policy_of = policy_of
        self._inbound = inbound

    async def CreateSandbox(self, request: Any, context: Any) -> control_pb2.CreateSandboxResult:
        sandboxes = self._offered()
        row, sandbox = await sandboxes.create(self._spec(request), auto_remove=request.auto_remove)
        return control_pb2.CreateSandboxResult(sandbox=self._message(row, sandbox))

    async def ListSandboxes(self, request: Any, context: Any) -> control_pb2.ListSandboxesResult:
        rows = await asyncio.to_thread(self._offered().listed, everything=request.all)
        return control_pb2.ListSandboxesResult(sandboxes=[self._message(row, sandbox) for row, sandbox in rows])

    async def RemoveSandbox(self, request: Any, context: Any) -> control_pb2.RemoveSandboxResult:
        if not request.id:
            raise InvalidInput("id: is empty")
        if request.grace_seconds > MAX_GRACE_S:
            raise InvalidInput(f"grace_seconds: {request.grace_seconds} is more than {MAX_GRACE_S}")
        grace_s = float(request.grace_seconds or GRACE_S)
        await self._offered().remove(request.id, force=request.force, grace_s=grace_s)
        return control_pb2.RemoveSandboxResult()

    async def AttachSandbox(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[control_pb2.AttachSandboxResult]:
        try:
            async with asyncio.timeout(FIRST_MESSAGE_S):
                first = await anext(requests, None)
        except TimeoutError as error:
            raise InvalidInput("id: the first message did not come") from error
        if first is None or first.WhichOneof("item") != "id" or not first.id:
            raise InvalidInput("id: the first message has to name the sandbox")
        async with self._offered().attach(first.id) as attached:
            # A task of its own: a generator must not yield inside a task group.
            inbox = asyncio.get_running_loop().create_task(_feed(requests, attached), name="attach-inbox")
            try:
                while chunk := await attached.streams.read():
                    yield control_pb2.AttachSandboxResult(output=chunk)
                yield control_pb2.AttachSandboxResult(exit_code=await attached.exit_code())
            finally:
                inbox.cancel()
                await asyncio.wait([inbox])

    def _offered(self) -> Sandboxes:
        if self._sandboxes is None:
            raise Conflict("this engine runs no sandboxes", code="ENGINE_UNSUPPORTED")
        return self._sandboxes

    def _spec(self, request: Any) -> SandboxSpec:
        if request.daemon:
            raise Conflict("daemon: this version starts sandboxes without the agent daemon", code="ENGINE_UNSUPPORTED")
        if not request.argv or len(request.argv) > MAX_WORDS:
            raise InvalidInput(f"argv: has to have 1 to {MAX_WORDS} words")
        if request.publish and self._inbound == "none":
            raise InvalidInput("publish: firewall.inbound is none, no port is published", hint="set it to host")
        uid, gid = self._ids()
        return SandboxSpec(
            project=request.project,
            agent=request.agent,
            argv=tuple(request.argv),
            env=dict(request.env),
            workdir=request.workdir or "/",
            mounts=tuple(Mount(m.source, m.target or m.source, m.read_only) for m in request.mounts),
            uid=0 if request.allow_root and not request.uid else request.uid or uid,
            gid=0 if request.allow_root and not request.gid else request.gid or gid,
            allow_root=request.allow_root,
            tty=request.tty,
            publish=tuple(Publish(p.host_port, p.port) for p in request.publish),
            limits=Limits(request.limits.memory_bytes, request.limits.cpu_percent, request.limits.pids),
        )

    def _message(self, row: RowLike, sandbox: Sandbox | None) -> control_pb2.Sandbox:
        spec = orjson.loads(row.spec)
        message = control_pb2.Sandbox(
            id=row.id,
            project=spec.get("project", ""),
            agent=spec.get("agent", ""),
            argv=spec.get("argv", ()),
            address=sandbox.address if sandbox is not None else "",
            created_at_unix=row.created_at,
            started_at_unix=row.started_at,
            finished_at_unix=row.finished_at,
            exit_code=row.exit_code,
            policy=self._policy_of(row.id) if sandbox is not None else 0,
            publish=[
                control_pb2.Publish(host_port=p.host_port, port=p.port)
                for p in (sandbox.publish if sandbox is not None else ())
            ],
        )
        message.state = int(row.state)  # type: ignore[assignment]
        return message


async def _feed(requests: AsyncIterator[Any], attached: Any) -> None:
    """Pass what the caller sends on to the command; what makes no sense is left out, the stream goes on."""
    async for message in requests:
        item = message.WhichOneof("item")
        try:
            if item == "stdin":
                await attached.streams.write(message.stdin)
            elif item == "close_stdin":
                attached.streams.close_input()
            elif item == "signal":
                await attached.signal(message.signal)
            elif item == "resize":
                attached.streams.resize(message.resize.rows, message.resize.columns)
        except ClawkerError:
            continue
