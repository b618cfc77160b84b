"""
Sandboxes that belong to the server, not to somebody's terminal: create, list, attach, remove (contract 2.4).

Such a sandbox lives until its command ends or it is removed; its streams are kept (`engines.host.console`),
its history is a row of the database. Lives themselves, and their order, are `agents.lifecycle`'s.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import orjson
import structlog

from clawker_cp.agents.directory import by_container
from clawker_cp.agents.lifecycle import LifeRequest, SandboxLives
from clawker_cp.agents.roster import Roster
from clawker_cp.agents.sandbox_rows import SandboxRow, SandboxRows, SandboxState
from clawker_cp.engines.base import Sandbox, SandboxSpec
from clawker_cp.engines.host.console import Attachment, Console
from clawker_cp.errors import ClawkerError, Conflict, NotFound, Unavailable
from clawker_cp.runtime.tasks import in_thread_to_the_end

log = structlog.get_logger()

DETACHED = "detached"  # in a spec's `extra`: not to be ended for want of a client
NO_RULES = "rules: []\n"
ENDED_KEPT = 64  # consoles of ended sandboxes, for who attaches late
DRAIN_LIMIT_S = 5.0
NOBODY = 1001


class Attached:
    """One attachment: the streams, and how the command ended."""

    def __init__(
        self, console: Attachment, ended: asyncio.Future[int], signal: Callable[[int], Awaitable[None]]
    ) -> None:
        self.streams = console
        self._ended = ended
        self.signal = signal

    async def exit_code(self) -> int:
        """Wait for the command's end."""
        return await asyncio.shield(self._ended)


class SandboxService:
    """
    `require_up` refuses while the firewall is off; `gone` is told when a sandbox has ended.

    What it starts is followed by tasks of `run`.
    """

    def __init__(
        self,
        lives: SandboxLives,
        rows: SandboxRows,
        roster: Roster,
        *,
        require_up: Callable[[], None],
        gone: Callable[[], None],
        living: Callable[[], list[Sandbox]],
        exit_code: Callable[[str], int | None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._lives = lives
        self._rows = rows
        self._roster = roster
        self._require_up = require_up
        self._gone = gone
        self._living = living
        self._exit_code = exit_code
        self._wall = wall
        self._consoles: OrderedDict[str, Console] = OrderedDict()
        self._ended: dict[str, asyncio.Future[int]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._begun = asyncio.Event()

    async def wait_running(self) -> None:
        """
        Wait until `run` can take sandboxes.
        """
        await self._begun.wait()

    async def run(self) -> None:
        """
        Own the tasks that follow sandboxes; on cancellation consoles are left for the next server.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._begun.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self._group = None
        finally:
            for console in self._consoles.values():
                console.leave()
            self._consoles.clear()

    async def create(self, spec: SandboxSpec, *, auto_remove: bool = False) -> tuple[SandboxRow, Sandbox]:
        """
        Enrol a sandbox and start its command. All or nothing; raises what engine and policy raise.
        """
        self._require_up()
        self._following()
        spec = replace(spec, extra={"rules": NO_RULES, "learn": False, DETACHED: True, "auto_remove": auto_remove})
        console: Console | None = None
        row: SandboxRow | None = None
        try:
            async with self._lives.prepared(LifeRequest(spec, NO_RULES)) as prepared:
                sandbox = _sandbox(prepared)
                document = orjson.dumps(spec.as_mapping()).decode()
                row = SandboxRow(sandbox.id, document, SandboxState.CREATED, int(self._wall()))
                await in_thread_to_the_end(partial(self._rows.put, row))
                console, streams = Console.open(sandbox.directory, tty=spec.tty)
                try:
                    await self._lives.launch(sandbox.id, streams)
                finally:
                    for fd in streams:
                        os.close(fd)
                await in_thread_to_the_end(partial(self._rows.started, sandbox.id, int(self._wall())))
                group = self._following()  # it may have ended meanwhile: nobody would follow this one
        except BaseException:
            if console is not None:
                console.close()
            if row is not None:
                await self._forget(row.id)
            raise
        self._follow(sandbox.id, console, group)
        return replace(row, state=SandboxState.RUNNING, started_at=int(self._wall())), sandbox

    def settle(self) -> None:
        """
        Bring the list to what became of sandboxes while no server ran. Blocks: call it in a thread.
        """
        self._rows.settle({sandbox.id for sandbox in self._living()}, int(self._wall()), self._exit_code)

    def ended_late(self, ids: Collection[str]) -> None:
        """
        Bring the list to sandboxes that could be taken away at last. Blocks: call it in a thread.
        """
        self._rows.forget_ended(ids)

    def adopt(self, sandbox: Sandbox) -> bool:
        """
        Take over a sandbox that an earlier server created here; False if it was a client's.
        """
        if not sandbox.spec.extra.get(DETACHED) or self._group is None:
            return False
        console = Console.reopen(sandbox.directory)
        self._follow(sandbox.id, console, self._group)
        return True

    def listed(self, *, everything: bool) -> list[tuple[SandboxRow, Sandbox | None]]:
        """
        Sandboxes with what the engine knows of those that live; also clients' own. Blocks: call it in a thread.
        """
        living = {sandbox.id: sandbox for sandbox in self._living()}
        rows = {row.id: row for row in self._rows.all()}
        for sandbox in living.values():
            state = SandboxState.RUNNING if sandbox.pid else SandboxState.CREATED
            known = rows.get(
                sandbox.id, SandboxRow(sandbox.id, orjson.dumps(sandbox.spec.as_mapping()).decode(), state, 0)
            )
            rows[sandbox.id] = replace(known, state=state)
        return [
            (row, living.get(row.id)) for row in rows.values() if everything or row.state is not SandboxState.EXITED
        ]

    async def remove(self, reference: str, *, force: bool, grace_s: float) -> None:
        """
        End a sandbox and forget it. Raises `Conflict` (`AGENT_RUNNING`) for a running one without `force`,
        `NotFound` for one that is not known, `Unavailable` for one that cannot be taken away now.
        """
        try:
            sandbox_id = by_container(reference, self._living()).id
        except NotFound:
            if not await asyncio.to_thread(self._rows.remove, reference):
                raise
            self._drop(reference)
            return
        if not force:
            raise Conflict(f"sandbox {sandbox_id[:12]} is running", code="AGENT_RUNNING", hint="remove it with force")
        ended = self._ended.get(sandbox_id)
        await asyncio.to_thread(self._rows.forget_at_end, sandbox_id)
        await self._lives.stop(sandbox_id, grace_s=grace_s)
        if self._lives.knows(sandbox_id):
            raise Unavailable(
                f"sandbox {sandbox_id[:12]} cannot be taken away now",
                hint="it stays listed and enforced and is tried again every few seconds; the log has the cause",
            )
        if ended is not None:
            await asyncio.wait([ended], timeout=DRAIN_LIMIT_S)
        await asyncio.to_thread(self._rows.remove, sandbox_id)
        self._drop(sandbox_id)

    @asynccontextmanager
    async def attach(self, reference: str) -> AsyncIterator[Attached]:
        """
        Follow a sandbox's streams; leaving does not stop it. One at a time.

        Raises `NotFound` for a sandbox that is not known or belongs to a client's terminal.
        """
        sandbox_id = reference
        if reference not in self._consoles:
            sandbox_id = by_container(reference, self._living()).id
        console, ended = self._consoles.get(sandbox_id), self._ended.get(sandbox_id)
        if console is None or ended is None:
            raise NotFound(f"sandbox {sandbox_id[:12]} has no streams here", hint="it belongs to a client's terminal")

        async def signal(signo: int) -> None:
            await self._lives.signal(sandbox_id, signo)

        async with console.attach() as streams:
            yield Attached(streams, ended, signal)

    # -- inner -------------------------------------------------------------------------------

    def _following(self) -> asyncio.TaskGroup:
        if self._group is None:
            raise Conflict("the control plane is shutting down", code="QUEUE_CLOSED")
        return self._group

    def _follow(self, sandbox_id: str, console: Console | None, group: asyncio.TaskGroup) -> None:
        if console is not None:
            console.start()
            self._consoles[sandbox_id] = console
        ended = self._ended[sandbox_id] = asyncio.get_running_loop().create_future()
        group.create_task(self._finish(sandbox_id, console, ended), name="sandbox")

    async def _finish(self, sandbox_id: str, console: Console | None, ended: asyncio.Future[int]) -> None:
        code = 137
        try:
            code = await self._lives.finish(sandbox_id)
        except (ClawkerError, OSError) as error:
            log.info("sandbox_gone", id=sandbox_id[:12], cause=str(error))
        try:
            await asyncio.to_thread(self._rows.finished, sandbox_id, int(self._wall()), code)
        except (ClawkerError, OSError) as error:
            log.warning("sandbox_row_unwritten", id=sandbox_id[:12], cause=str(error))
        if not ended.done():
            ended.set_result(code)
        if console is not None:
            try:
                async with asyncio.timeout(DRAIN_LIMIT_S):
                    await console.wait_ended()
            except TimeoutError:
                log.info("sandbox_output_cut", id=sandbox_id[:12])
            console.close()
        while len(self._consoles) > ENDED_KEPT:
            oldest = next((one for one in self._consoles if self._ended[one].done()), None)
            if oldest is None:
                break
            self._drop(oldest)
        self._gone()

    async def _forget(self, sandbox_id: str) -> None:
        """Take back the row of a sandbox that did not come to be; one that stays is told at the next start."""
        try:
            await in_thread_to_the_end(partial(self._rows.remove, sandbox_id))
        except ClawkerError as error:
            log.warning("sandbox_row_unwritten", id=sandbox_id[:12], cause=str(error))

    def _drop(self, sandbox_id: str) -> None:
        self._consoles.pop(sandbox_id, None)
        self._ended.pop(sandbox_id, None)


def host_ids(environment: Mapping[str, str]) -> tuple[int, int]:
    """
    Uid and gid of unprivileged steps: CLAWKER_HOST_UID and _GID, else 1001 with a line in the log (contract 1.4).
    """
    found = []
    for name in ("CLAWKER_HOST_UID", "CLAWKER_HOST_GID"):
        text = environment.get(name, "")
        reason = "" if text else "unset"
        if text and not (text.isascii() and text.isdecimal() and int(text) < 1 << 32):
            reason = "malformed"
        elif text and int(text) == 0:
            reason = "non_positive"
        if reason:
            log.info("host_id_unavailable", variable=name, reason=reason)
        found.append(NOBODY if reason else int(text))
    return found[0], found[1]


def _sandbox(prepared: object) -> Sandbox:
    assert isinstance(prepared, Sandbox)
    return prepared
