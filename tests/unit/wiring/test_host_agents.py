"""The host engine's agents over the life of a server: what the next one takes over, ends, and says is gone."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from clawker_cp.agents.database import Database
from clawker_cp.agents.quarantines import OPERATOR, Quarantines
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.agents.sandbox_rows import SandboxRows, SandboxState
from clawker_cp.config import Directories, Settings
from clawker_cp.ebpf.manager import Manager
from clawker_cp.engines.base import SandboxSpec
from clawker_cp.engines.host.console import Console
from clawker_cp.errors import NotFound, Unavailable
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.reconcile import Reconciler
from clawker_cp.firewall.store import RuleStore
from clawker_cp.rpc.local_protocol import SOCKET_NAME
from clawker_cp.telemetry.connections import Connections
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.testing.policy_journal import Journal, JournalNames
from clawker_cp.testing.sandbox_world import Host, end, eventually, make_engine, running_host, sh
from clawker_cp.wiring import host_agents
from clawker_cp.wiring.agent_control import AgentControl
from clawker_cp.wiring.enforcement import Enforcement, Living
from clawker_cp.wiring.host_agents import HostAgents
from clawker_cp.wiring.reports import Reports

pytestmark = [pytest.mark.root, pytest.mark.slow]

LASTING = ("sh", "-c", "trap 'exit 5' TERM; trap 'exit 6' USR1; echo up; while :; do sleep 0.05; done")
RULES = "rules:\n- dst: a.example.com\n"
LIMIT_S = 20.0


class Refusing(Enforcement):
    """Enforcement that refuses one agent."""

    refused = ""

    async def enroll(self, agent: EnrolledAgent, living: Living) -> None:
        if agent.agent == self.refused:
            raise Unavailable("the kernel refuses the row")
        await super().enroll(agent, living)


class Server:
    """Engine, kernel, policy and database as a server has them; the proxy alone is a journal."""

    def __init__(self, host: Host, pins: Path, database: Database) -> None:
        self.engine = make_engine(host.state, host.cgroup_parent)
        self.manager, self.roster, connections = Manager(pins, max_agents=64), Roster(), Connections()
        self.quarantines, self.rows = Quarantines(database), SandboxRows(database)
        self.idle = asyncio.Event()
        self.enforcement = Refusing(
            self.manager, self.engine, self.engine.ring, self.roster, connections, plan=lambda: self.policy.plan
        )
        rules, journal = host.state.parent / "rules", Journal()
        rules.mkdir(exist_ok=True)
        self.policy = Reconciler(
            RuleStore(rules), AllocationFiles(rules), journal, self.manager, self.enforcement,
            JournalNames(journal, time.monotonic),
        )  # fmt: skip
        reports = Reports(
            FlowLog(rules / "flows.jsonl"), self.roster, connections, self.manager, lambda: (), self.engine.exit_code
        )
        self.socket = host.state.parent / "run" / SOCKET_NAME
        self.side = HostAgents(
            self.engine, Settings(), Directories(rules, rules, self.socket.parent, rules), self.policy, self.manager,
            self.enforcement, self.roster, reports, database, self.quarantines,
            require_up=lambda: None, idle=self.idle.set,
        )  # fmt: skip
        self.control = AgentControl(self.policy, self.enforcement, self.roster, self.quarantines, self.side.find)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """As the application does it, up to a death that leaves sandboxes and enforcement as they are."""
        await self.side.prepare()
        self.manager.load(self.engine.parent_cgroup)
        await self.policy.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.policy.run())
                tasks = [group.create_task(_run(run)) for _, run, _ in self.side.parts()]
                tasks += await self.side.take_over(group, self.control)
                try:
                    yield
                finally:
                    self.side.close()
                    for task in tasks:
                        task.cancel()
                    self.policy.close()
        finally:
            self.manager.close()
            await self.engine.aclose(remove=False)

    async def create(self, agent: str) -> str:
        """A sandbox of the server's own."""
        _, sandbox = await self.side.sandboxes.create(SandboxSpec("p", agent, LASTING))
        return sandbox.id


async def _run(part: Callable[[], Any]) -> None:
    await part()


class Place:
    """One host, on which server follows server."""

    def __init__(self, host: Host, pins: Path, database: Database) -> None:
        self.host, self.pins, self.database = host, pins, database

    def server(self) -> Server:
        return Server(self.host, self.pins, self.database)

    async def client_sandbox(self, agent: str, rules: str = RULES) -> str:
        """A sandbox whose `run` client died together with its server."""
        engine = make_engine(self.host.state, self.host.cgroup_parent)
        await engine.start()
        spec = self.host.spec(*LASTING, agent=agent, extra={"rules": rules, "learn": False})
        made = await engine.create(spec)
        with open(os.devnull, "r+b") as nothing:
            await engine.run(made.id, (nothing.fileno(),) * 3)
        await engine.aclose(remove=False)
        return made.id


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    pins = Path("/sys/fs/bpf") / f"ckh{os.getpid()}-{secrets.token_hex(2)}"
    database = Database(tmp_path / "cp.db")
    database.open()
    async with running_host(tmp_path) as host:
        await host.engine.aclose(remove=True)
        try:
            yield Place(host, pins, database)
        finally:
            last = make_engine(host.state, host.cgroup_parent)
            await last.start()
            for sandbox in last.living():
                if (console := Console.reopen(sandbox.directory)) is not None:
                    console.close()
                await last.remove(sandbox.id, force=True, grace_s=0)
            Manager(pins).flush(force=True)
            await end(last)
            database.close()


async def test_a_client_sandbox_is_taken_over_with_all_that_counted(place: Place) -> None:
    """Its own rules are in force before it is enrolled; deadline and quarantine are as the earlier server left them."""
    one = await place.client_sandbox("one")
    first = place.server()
    until_ns = time.monotonic_ns() + 3600 * 10**9
    async with first.serving():
        (agent,) = list(first.roster)
        assert (agent.id, agent.key) == (one, "agent:p/one")
        assert [(rule.dst, rule.scope) for rule in first.policy.rules] == [("a.example.com", agent.key)]
        await first.enforcement.open_until(agent, until_ns, 3600)
        first.quarantines.put(one, OPERATOR, "odd", 5)
    second = place.server()
    async with second.serving():
        found = second.roster.by_id(one)
        assert found is not None and (found.bypass_until_ns, found.quarantined) == (until_ns, True)
        assert found.policy == second.policy.policy_of("agent:p/one") != 1
        row = second.manager.agents()[found.cgroup_id]
        assert (row.policy, row.bypass_until_ns, row.quarantined) == (found.policy, until_ns, True)
        assert await second.side.cgroups() == {found.cgroup_id}
        assert (await second.side.find("clawker.p.one")).id == one
        with pytest.raises(NotFound):
            await second.side.find("clawker.p.two")
        assert second.socket.is_socket()
    assert not second.socket.exists()


async def test_one_that_cannot_be_taken_over_keeps_none_of_the_others_back(place: Place) -> None:
    """It is left as the kernel has it, said in the log; the next is enrolled."""
    for name in ("bad", "good"):
        await place.client_sandbox(name)
    server = place.server()
    server.enforcement.refused = "bad"
    with capture_logs() as logs:
        async with server.serving():
            rows = server.manager.agents()
            enrolled = {one.agent for one in server.side.living() if one.cgroup_id in rows}
            running = {one.agent for one in await server.side.running()}

    assert enrolled == {"good"} and running == {"bad", "good"}
    assert [line["cause"] for line in logs if line["event"] == "enroll_failed"] == ["the kernel refuses the row"]


async def test_a_sandbox_nobody_comes_back_for_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a time without its client it is stopped and withdrawn; with the last one the server is idle."""
    monkeypatch.setattr(host_agents, "UNCLAIMED_S", 0.1)
    await place.client_sandbox("one")
    server = place.server()
    async with server.serving(), asyncio.timeout(LIMIT_S):
        await server.idle.wait()
        assert server.side.living() == [] and server.manager.agents() == {} and len(server.roster) == 0
        assert server.policy.rules == ()


async def test_a_server_that_nobody_comes_to_is_idle(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever started it may have been killed before it came."""
    monkeypatch.setattr(host_agents, "UNCLAIMED_S", 0.1)
    server = place.server()
    async with server.serving(), asyncio.timeout(LIMIT_S):
        await server.idle.wait()


async def test_the_servers_own_sandbox_waits_for_nobody(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next server follows it, whoever is attached or not, until its command ends, and lists how."""
    monkeypatch.setattr(host_agents, "UNCLAIMED_S", 0.0)
    first = place.server()
    async with first.serving():
        own = await first.create("own")
    theirs = await place.client_sandbox("theirs")
    second = place.server()
    async with second.serving(), asyncio.timeout(LIMIT_S):
        await eventually(lambda: theirs not in {one.id for one in second.side.living()}, "the unclaimed one's end")
        async with second.side.sandboxes.attach(own) as attached:
            await attached.signal(signal.SIGUSR1)
            assert await attached.exit_code() == 6
        await second.idle.wait()
    row = second.rows.get(own)
    assert row is not None and (row.state, row.exit_code) == (SandboxState.EXITED, 6)


async def test_the_server_is_idle_with_the_last_sandbox_and_not_before(place: Place) -> None:
    """The end of one of two says nothing."""
    server = place.server()
    async with server.serving(), asyncio.timeout(LIMIT_S):
        one, two = await server.create("one"), await server.create("two")
        await server.side.sandboxes.remove(one, force=True, grace_s=0)
        await eventually(lambda: [row.id for row, _ in server.side.sandboxes.listed(everything=True)] == [two], "one")
        assert not server.idle.is_set()
        await server.side.sandboxes.remove(two, force=True, grace_s=0)
        await server.idle.wait()


async def test_the_last_stage_of_a_drain_takes_the_bridge_only_when_nothing_lives(place: Place) -> None:
    """With a sandbox left it stays for the next server (R24)."""
    first = place.server()
    async with first.serving():
        one = await first.create("one")
        assert await drained(first, empty=False)
    second = place.server()
    async with second.serving():
        await second.side.sandboxes.remove(one, force=True, grace_s=0)
        assert not await drained(second, empty=True)


async def drained(server: Server, *, empty: bool) -> bool:
    """Go through the last stage; whether the bridge is there after it."""
    ((name, stage),) = server.side.stages(empty=empty)
    assert name == "engine"
    await stage()
    return "cwtest0" in sh("ip", "-o", "link")
