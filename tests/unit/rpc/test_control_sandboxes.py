"""Sandboxes over the wire: what a request may ask, what a row shows, and the two-way stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.agents.sandbox_rows import SandboxRow, SandboxState
from clawker_cp.engines.base import Publish, Sandbox, SandboxSpec
from clawker_cp.errors import Conflict, InvalidInput, NotFound
from clawker_cp.rpc import control_sandboxes
from clawker_cp.rpc.control_sandboxes import SandboxRpcs


class Streams:
    def __init__(self) -> None:
        self.output = [b"one", b"two", b""]
        self.told: list[Any] = []
        self.fed = asyncio.Event()

    async def read(self) -> bytes:
        await self.fed.wait()
        return self.output.pop(0)

    async def write(self, data: bytes) -> None:
        self.told.append(data)

    def close_input(self) -> None:
        self.told.append("closed")
        self.fed.set()

    def resize(self, rows: int, columns: int) -> None:
        if not rows:
            raise InvalidInput("resize")
        self.told.append((rows, columns))


class Service:
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.spec: SandboxSpec | None = None
        self.told: list[Any] = []
        self.streams = Streams()

    async def create(self, spec: SandboxSpec, *, auto_remove: bool) -> tuple[SandboxRow, Sandbox]:
        self.spec = spec
        self.told.append(auto_remove)
        sandbox = Sandbox("i" * 64, spec, "198.51.100.7", "n", "v", Path("/x"), 7, Path("/x"), (Publish(4000, 80),))
        row = SandboxRow("i" * 64, orjson.dumps(spec.as_mapping()).decode(), SandboxState.RUNNING, 1, 2)
        return row, sandbox

    def listed(self, *, everything: bool) -> list[tuple[SandboxRow, Sandbox | None]]:
        spec = orjson.dumps(SandboxSpec("p", "a", ("sh", "-c")).as_mapping()).decode()
        return [(SandboxRow("e" * 64, spec, SandboxState.EXITED, 1, 2, 3, 137), None)] if everything else []

    async def remove(self, reference: str, *, force: bool, grace_s: float) -> None:
        self.told.append((reference, force, grace_s))

    @asynccontextmanager
    async def attach(self, reference: str) -> AsyncIterator[Any]:
        if reference != "i":
            raise NotFound("no such sandbox", code="AGENT_NOT_FOUND")
        service = self

        class Attached:
            streams = service.streams

            async def signal(self, signo: int) -> None:
                service.streams.told.append(f"signal {signo}")

            async def exit_code(self) -> int:
                return 7

        yield Attached()


def rpcs(service: Service | None, inbound: str = "host") -> SandboxRpcs:
    return SandboxRpcs(service, ids=lambda: (1234, 1235), policy_of=lambda _: 5, inbound=inbound)


def request(**fields: Any) -> Any:
    return control_pb2.CreateSandboxRequest(**{"project": "p", "agent": "a", "argv": ["true"], **fields})


async def test_a_request_becomes_a_spec_and_the_sandbox_is_told() -> None:
    """Defaults are the server's, everything asked for arrives, and ports and policy come back."""
    service = Service()
    asked = request(
        env={"A": "b"}, workdir="/work", mounts=[control_pb2.Mount(source="/src", read_only=True)], tty=True,
        auto_remove=True, publish=[control_pb2.Publish(port=80)],
        limits=control_pb2.Limits(memory_bytes=1, cpu_percent=2, pids=3),
    )  # fmt: skip
    made = (await rpcs(service).CreateSandbox(asked, None)).sandbox
    spec = service.spec
    assert spec is not None and service.told == [True]
    assert (spec.uid, spec.gid, spec.workdir, spec.tty, dict(spec.env)) == (1234, 1235, "/work", True, {"A": "b"})
    assert (spec.mounts[0].target, spec.mounts[0].read_only) == ("/src", True)
    assert (spec.limits.memory_bytes, spec.limits.cpu_percent, spec.limits.pids) == (1, 2, 3)
    assert (made.state, made.address, made.policy) == (control_pb2.SANDBOX_STATE_RUNNING, "198.51.100.7", 5)
    assert (made.publish[0].host_port, made.publish[0].port, list(made.argv)) == (4000, 80, ["true"])


async def test_root_is_root_only_when_allowed() -> None:
    """`allow_root` without a uid is uid 0; without it the server's own ids."""
    service = Service()
    await rpcs(service).CreateSandbox(request(allow_root=True), None)
    assert service.spec is not None and (service.spec.uid, service.spec.gid) == (0, 0)
    await rpcs(service).CreateSandbox(request(uid=77, gid=78), None)
    assert (service.spec.uid, service.spec.gid) == (77, 78)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"argv": []}, InvalidInput, "argv"),
        ({"argv": ["x"] * 5000}, InvalidInput, "argv"),
        ({"daemon": True}, Conflict, "daemon"),
        ({"publish": [control_pb2.Publish(port=80)]}, InvalidInput, "publish"),
    ],
)
async def test_what_cannot_be_is_named(fields: dict[str, Any], error: type[Exception], said: str) -> None:
    """Nothing is created for it."""
    service = Service()
    with pytest.raises(error, match=said):
        await rpcs(service, inbound="none").CreateSandbox(request(**fields), None)
    assert service.spec is None


async def test_an_engine_without_sandboxes_says_so() -> None:
    """Every RPC has the code of the contract."""
    for method, asked in (
        ("CreateSandbox", request()), ("ListSandboxes", control_pb2.ListSandboxesRequest()),
        ("RemoveSandbox", control_pb2.RemoveSandboxRequest(id="x")),
    ):  # fmt: skip
        with pytest.raises(Conflict) as refused:
            await getattr(rpcs(None), method)(asked, None)
        assert refused.value.code == "ENGINE_UNSUPPORTED"


async def test_ended_ones_are_listed_on_demand() -> None:
    """With times and exit code; an ended one has neither address nor policy."""
    assert not (await rpcs(Service()).ListSandboxes(control_pb2.ListSandboxesRequest(), None)).sandboxes
    (row,) = (await rpcs(Service()).ListSandboxes(control_pb2.ListSandboxesRequest(all=True), None)).sandboxes
    assert (row.state, row.exit_code, row.finished_at_unix, row.policy) == (control_pb2.SANDBOX_STATE_EXITED, 137, 3, 0)


async def test_removing_has_a_bounded_grace() -> None:
    """Zero is ten seconds, more than ten minutes and no id are refused."""
    service = Service()
    await rpcs(service).RemoveSandbox(control_pb2.RemoveSandboxRequest(id="x", force=True), None)
    assert service.told == [("x", True, 10.0)]
    for fields, said in (({"id": ""}, "id"), ({"id": "x", "grace_seconds": 601}, "grace_seconds")):
        with pytest.raises(InvalidInput, match=said):
            await rpcs(service).RemoveSandbox(control_pb2.RemoveSandboxRequest(**fields), None)


async def requests(*messages: Any) -> AsyncIterator[Any]:
    for message in messages:
        yield message
    await asyncio.Event().wait()


async def test_an_attachment_goes_both_ways_and_ends_with_the_code() -> None:
    """Input, signals and sizes reach the command in order; nonsense in between does not end the stream."""
    service = Service()
    sent = [
        control_pb2.AttachSandboxRequest(id="i"),
        control_pb2.AttachSandboxRequest(stdin=b"hello"),
        control_pb2.AttachSandboxRequest(resize=control_pb2.WindowSize(rows=0)),
        control_pb2.AttachSandboxRequest(resize=control_pb2.WindowSize(rows=2, columns=3)),
        control_pb2.AttachSandboxRequest(signal=15),
        control_pb2.AttachSandboxRequest(close_stdin=True),
    ]
    async with asyncio.timeout(5):
        said = [one async for one in rpcs(service).AttachSandbox(requests(*sent), None)]
    assert [one.output for one in said[:2]] == [b"one", b"two"] and said[2].exit_code == 7
    assert service.streams.told == [b"hello", (2, 3), "signal 15", "closed"]


@pytest.mark.parametrize(
    "first", [control_pb2.AttachSandboxRequest(stdin=b"x"), control_pb2.AttachSandboxRequest(id="")]
)
async def test_the_first_message_names_the_sandbox(first: Any) -> None:
    """Anything else is refused, and so is an unknown one."""
    with pytest.raises(InvalidInput, match="id"):
        await anext(rpcs(Service()).AttachSandbox(requests(first), None))
    with pytest.raises(NotFound):
        await anext(rpcs(Service()).AttachSandbox(requests(control_pb2.AttachSandboxRequest(id="other")), None))


async def test_a_caller_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """After five seconds the stream is refused."""
    monkeypatch.setattr(control_sandboxes, "FIRST_MESSAGE_S", 0.02)
    with pytest.raises(InvalidInput, match="did not come"):
        await anext(rpcs(Service()).AttachSandbox(requests(), None))
