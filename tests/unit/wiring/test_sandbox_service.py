"""Sandboxes that belong to the server: made whole or not at all, followed to their end, attached to, removed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from clawker_cp.agents.database import Database
from clawker_cp.agents.lifecycle import LifeRequest, SandboxLives
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.agents.sandbox_rows import SandboxRows, SandboxState
from clawker_cp.engines.base import Sandbox, SandboxSpec
from clawker_cp.engines.host.console import RECORD, Console
from clawker_cp.errors import Conflict, NotFound, Unavailable
from clawker_cp.wiring import sandbox_service
from clawker_cp.wiring.sandbox_service import Attached, SandboxService, host_ids

# Waits to be told on its input, says so, and ends with the number it was told.
OBEYS = ("sh", "-c", 'echo begun; read code; echo "told $code"; exit $code')
LIMIT_S = 10.0


class Processes:
    """An engine whose sandboxes are ordinary processes, and the policy and the kernel that let them begin."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: dict[str, Sandbox] = {}
        self.running: dict[str, asyncio.subprocess.Process] = {}
        self.enrolled: set[str] = set()
        self.refuse: Unavailable | None = None
        self.held: asyncio.Event | None = None
        self.undead = False

    def living(self) -> list[Sandbox]:
        return list(self.made.values())

    async def create(self, spec: SandboxSpec) -> Sandbox:
        number = secrets.token_hex(32)
        place = self.directory / number
        place.mkdir()
        self.made[number] = Sandbox(number, spec, "198.51.100.7", "", "", place, len(self.made) + 1, place)
        return self.made[number]

    async def run(self, sandbox_id: str, streams: tuple[int, int, int]) -> None:
        assert sandbox_id in self.enrolled
        if self.refuse is not None:
            raise self.refuse
        if self.held is not None:
            self.held.set()
            await asyncio.Event().wait()
        sandbox, (stdin, stdout, stderr) = self.made[sandbox_id], streams
        self.running[sandbox_id] = await asyncio.create_subprocess_exec(
            *sandbox.spec.argv, stdin=stdin, stdout=stdout, stderr=stderr
        )
        self.made[sandbox_id] = replace(sandbox, pid=self.running[sandbox_id].pid)

    async def wait(self, sandbox_id: str) -> int:
        return await self.running[sandbox_id].wait()

    async def signal(self, sandbox_id: str, signo: int) -> None:
        self.running[sandbox_id].send_signal(signo)

    async def stop(self, sandbox_id: str, *, grace_s: float) -> None:
        if self.undead:
            raise Unavailable("a process of it does not end")
        process = self.running.get(sandbox_id)
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def remove(self, sandbox_id: str, *, force: bool, grace_s: float) -> None:
        await self.stop(sandbox_id, grace_s=grace_s)
        self.made.pop(sandbox_id, None)

    async def put_ephemeral(self, key: str, rules: str, *, learn: bool) -> int:
        return 5

    def policy_of(self, key: str) -> int:
        return 5

    async def drop_ephemeral(self, key: str) -> None:
        return

    async def enroll(self, agent: EnrolledAgent, sandbox: Any) -> None:
        self.enrolled.add(agent.id)

    async def withdraw(self, agent: EnrolledAgent) -> None:
        self.enrolled.discard(agent.id)


class World:
    """One server after the other over the same database and the same processes."""

    def __init__(self, directory: Path, database: Database) -> None:
        self.engine = Processes(directory)
        self.rows = SandboxRows(database)
        self.up = True
        self.gone = asyncio.Event()
        self.service = self.another()

    def another(self) -> SandboxService:
        self.lives = SandboxLives(self.engine, self.engine, self.engine, Roster())
        return SandboxService(
            self.lives, self.rows, Roster(),
            require_up=self._require_up, gone=self.gone.set, living=self.engine.living, exit_code=lambda _id: None,
            wall=lambda: 50.0,
        )  # fmt: skip

    def _require_up(self) -> None:
        if not self.up:
            raise Conflict("off", code="FIREWALL_NOT_INITIALIZED")

    async def start(self, *argv: str, agent: str = "dev", **more: Any) -> str:
        row, sandbox = await self.service.create(SandboxSpec("shop", agent, argv or OBEYS), **more)
        assert (row.id, row.state, row.started_at) == (sandbox.id, SandboxState.RUNNING, 50)
        return sandbox.id

    async def ended(self) -> None:
        """Wait until one more sandbox has been taken apart."""
        async with asyncio.timeout(LIMIT_S):
            await self.gone.wait()
        self.gone.clear()

    def states(self, *, everything: bool = True) -> dict[str, SandboxState]:
        return {row.id: row.state for row, _ in self.service.listed(everything=everything)}

    async def everything_said(self, sandbox_id: str) -> bytes:
        async with self.service.attach(sandbox_id) as attached:
            return await rest(attached)


async def rest(attached: Attached) -> bytes:
    """What is left of an output."""
    said = b""
    async with asyncio.timeout(LIMIT_S):
        while piece := await attached.streams.read():
            said += piece
    return said


@asynccontextmanager
async def serving(service: SandboxService) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(service.run())
        await service.wait_running()
        yield
        task.cancel()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    database = Database(tmp_path / "cp.db")
    database.open()
    yield World(tmp_path, database)
    for record in tmp_path.glob(f"*/{RECORD}"):
        if (left := Console.reopen(record.parent)) is not None:
            left.close()
    database.close()


async def test_a_sandbox_is_followed_to_its_end(world: World) -> None:
    """Its output and its exit code reach who is attached, its end the list, and the server hears of it."""
    async with serving(world.service):
        one = await world.start()
        assert world.states(everything=False) == {one: SandboxState.RUNNING} and world.engine.enrolled == {one}
        async with world.service.attach(one) as attached, asyncio.timeout(LIMIT_S):
            await attached.streams.write(b"7\n")
            assert await rest(attached) == b"begun\ntold 7\n"
            assert await attached.exit_code() == 7
        await world.ended()

    assert world.states() == {one: SandboxState.EXITED} and world.states(everything=False) == {}
    row = world.rows.get(one)
    assert row is not None and (row.exit_code, row.finished_at) == (7, 50)
    assert world.engine.enrolled == set() and len(world.lives) == 0


async def test_a_sandbox_whose_start_fails_was_never_there(world: World) -> None:
    """All or nothing: no row in the list, no streams, nothing enrolled."""
    world.engine.refuse = Unavailable("no such program")
    async with serving(world.service):
        with pytest.raises(Unavailable, match="no such program"):
            await world.start()
        left = [place.name for place in world.engine.directory.iterdir() if place.is_dir()]
        with pytest.raises(NotFound):
            await world.everything_said(left[0])

    assert world.states() == {} and world.rows.all() == []
    assert world.engine.enrolled == set() and world.engine.made == {}


async def test_a_start_that_is_given_up_was_never_there(world: World) -> None:
    """A caller that goes away while the command is being started leaves no row either."""
    world.engine.held = asyncio.Event()
    async with serving(world.service):
        starting = asyncio.ensure_future(world.start())
        async with asyncio.timeout(LIMIT_S):
            await world.engine.held.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    assert world.rows.all() == [] and world.engine.enrolled == set() and world.engine.made == {}


async def test_a_start_that_the_servers_end_overtakes_was_never_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would follow it, and its caller hears that there is none."""
    following, begin = asyncio.ensure_future(world.service.run()), world.engine.run

    async def overtaken(sandbox_id: str, streams: tuple[int, int, int]) -> None:
        await begin(sandbox_id, streams)
        following.cancel()
        await asyncio.wait([following])

    monkeypatch.setattr(world.engine, "run", overtaken)
    await world.service.wait_running()
    with pytest.raises(Conflict, match="shutting down"):
        await world.start()

    assert world.rows.all() == [] and world.engine.enrolled == set() and world.engine.made == {}


async def test_nothing_begins_while_the_firewall_is_off_or_the_server_ends(world: World) -> None:
    """Each refusal has its reason, and comes before anything is made."""
    with pytest.raises(Conflict, match="shutting down") as ending:
        await world.start()
    world.up = False
    async with serving(world.service):
        with pytest.raises(Conflict) as off:
            await world.start()

    assert (ending.value.code, off.value.code) == ("QUEUE_CLOSED", "FIREWALL_NOT_INITIALIZED")
    assert world.rows.all() == [] and world.engine.made == {}


async def test_one_that_goes_with_its_end_leaves_what_it_said(world: World) -> None:
    """Its row is gone at once; who attaches late still gets the output and the code."""
    async with serving(world.service):
        one = await world.start("sh", "-c", "echo last words; exit 3", auto_remove=True)
        await world.ended()
        assert world.states() == {}
        async with world.service.attach(one) as attached, asyncio.timeout(LIMIT_S):
            assert (await rest(attached), await attached.exit_code()) == (b"last words\n", 3)


async def test_streams_of_the_ended_are_kept_up_to_a_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it the oldest that ended goes, never one that runs."""
    monkeypatch.setattr(sandbox_service, "ENDED_KEPT", 2)
    async with serving(world.service):
        runs = await world.start(agent="runs")
        ended = []
        for number in range(2):
            ended.append(await world.start("echo", str(number), agent=f"a{number}"))
            await world.ended()
        with pytest.raises(NotFound):
            await world.everything_said(ended[0])
        assert await world.everything_said(ended[1]) == b"1\n"
        async with world.service.attach(runs) as attached, asyncio.timeout(LIMIT_S):
            assert await attached.streams.read() == b"begun\n"
        await world.service.remove(runs, force=True, grace_s=0)


async def test_only_force_removes_what_runs(world: World) -> None:
    """Without it the caller is told how; with it the sandbox is ended and forgotten, streams included."""
    async with serving(world.service):
        one = await world.start()
        with pytest.raises(Conflict, match="is running") as refused:
            await world.service.remove(one, force=False, grace_s=0)
        assert refused.value.code == "AGENT_RUNNING" and refused.value.hint == "remove it with force"
        await world.service.remove(one[:12], force=True, grace_s=0)
        assert world.states() == {} and world.engine.made == {}
        for act in (world.everything_said(one), world.service.remove(one, force=True, grace_s=0)):
            with pytest.raises(NotFound):
                await act


async def test_one_that_cannot_be_taken_away_stays_listed(world: World) -> None:
    """The caller is told that it is tried again, the row stays; once it could be ended it is forgotten."""
    async with serving(world.service):
        one = await world.start()
        world.engine.undead = True
        with pytest.raises(Unavailable, match="cannot be taken away now") as refused:
            await world.service.remove(one, force=True, grace_s=0)
        assert "tried again" in (refused.value.hint or "")
        assert world.states() == {one: SandboxState.RUNNING} and world.engine.enrolled == {one}
        world.engine.undead = False
        assert await world.lives.retry() == [one]
        await world.ended()
        world.service.ended_late([one])
        assert world.states() == {} and world.engine.enrolled == set()


async def test_one_that_has_ended_is_removed_by_its_id(world: World) -> None:
    """Row and streams go; no force is needed."""
    async with serving(world.service):
        one = await world.start("true")
        await world.ended()
        await world.service.remove(one, force=False, grace_s=0)
        assert world.states() == {}
        with pytest.raises(NotFound):
            await world.everything_said(one)


async def test_a_signal_reaches_the_command(world: World) -> None:
    """Whoever is attached sends it; the exit code is the command's answer to it."""
    async with serving(world.service):
        one = await world.start("sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do read nothing; done")
        async with world.service.attach(one) as attached, asyncio.timeout(LIMIT_S):
            assert await attached.streams.read() == b"ready\n"
            await attached.signal(15)
            await attached.streams.write(b"\n")
            assert await attached.exit_code() == 9
        await world.ended()


async def test_a_clients_own_sandbox_is_listed_and_not_attached_to(world: World) -> None:
    """It lives in the client's terminal: no row, no streams here, and it is not taken over."""
    async with serving(world.service):
        theirs = await world.engine.create(SandboxSpec("shop", "theirs", OBEYS))
        assert world.states(everything=False) == {theirs.id: SandboxState.CREATED}
        assert not world.service.adopt(theirs)
        with pytest.raises(NotFound) as refused:
            await world.everything_said(theirs.id)

    assert refused.value.hint == "it belongs to a client's terminal"


async def test_the_next_server_takes_streams_and_end_over(world: World) -> None:
    """What was said before is gone with the first server; input, output and code go on with the second."""
    async with serving(world.service):
        one = await world.start()
        async with world.service.attach(one) as attached, asyncio.timeout(LIMIT_S):
            assert await attached.streams.read() == b"begun\n"
    assert world.engine.running[one].returncode is None
    world.service = world.another()
    async with serving(world.service):
        sandbox = world.engine.made[one]
        await world.lives.adopt(world.lives.adoptee(sandbox, LifeRequest(sandbox.spec, "")), sandbox)
        assert world.service.adopt(sandbox)
        async with world.service.attach(one) as attached, asyncio.timeout(LIMIT_S):
            await attached.streams.write(b"4\n")
            assert (await rest(attached), await attached.exit_code()) == (b"told 4\n", 4)
        await world.ended()
    row = world.rows.get(one)
    assert row is not None and (row.state, row.exit_code) == (SandboxState.EXITED, 4)


async def test_what_ended_while_no_server_ran_is_settled(world: World) -> None:
    """It is exited with the code of an end that nobody saw; one that lives stays as it is."""
    async with serving(world.service):
        gone, stays = await world.start(agent="gone"), await world.start(agent="stays")
    await world.engine.remove(gone, force=True, grace_s=0)
    world.service = world.another()
    world.service.settle()
    assert world.states() == {gone: SandboxState.EXITED, stays: SandboxState.RUNNING}
    row = world.rows.get(gone)
    assert row is not None and row.exit_code == 137
    await world.engine.remove(stays, force=True, grace_s=0)


@pytest.mark.slow
async def test_output_that_never_ends_is_cut(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that holds the output keeps it open after the command's end: only so long is it waited for."""
    monkeypatch.setattr(sandbox_service, "DRAIN_LIMIT_S", 0.1)
    async with serving(world.service):
        with capture_logs() as logs:
            await world.start("sh", "-c", "sleep 5 & exit 2")
            await world.ended()

    assert "sandbox_output_cut" in [line["event"] for line in logs]


@pytest.mark.parametrize(
    ("environment", "expected", "reasons"),
    [
        ({}, (1001, 1001), ["unset", "unset"]),
        ({"CLAWKER_HOST_UID": "1234", "CLAWKER_HOST_GID": "4294967295"}, (1234, 4294967295), []),
        ({"CLAWKER_HOST_UID": "0", "CLAWKER_HOST_GID": "4294967296"}, (1001, 1001), ["non_positive", "malformed"]),
        ({"CLAWKER_HOST_UID": "-1", "CLAWKER_HOST_GID": "\u0661"}, (1001, 1001), ["malformed", "malformed"]),
    ],
)
def test_ids_of_the_owner_come_from_the_environment(
    environment: dict[str, str], expected: tuple[int, int], reasons: list[str]
) -> None:
    """What is absent, zero or no number becomes 1001 with a line that says why (contract 1.4)."""
    with capture_logs() as logs:
        assert host_ids(environment) == expected
    assert [line["reason"] for line in logs] == reasons
