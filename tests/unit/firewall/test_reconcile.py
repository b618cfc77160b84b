"""
Tests of the order in which a change is applied, and of what happens when a part of it fails.

Stand-ins keep a journal of what they are told; rules, compile, store and allocations are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.errors import ClawkerError, Unavailable
from clawker_cp.firewall import merge, reconcile
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.changes import Change
from clawker_cp.firewall.names import NameTables
from clawker_cp.firewall.plan import Plan, Topology
from clawker_cp.firewall.reconcile import Reconciler
from clawker_cp.firewall.resolving import PolicyNames
from clawker_cp.firewall.store import RuleStore
from clawker_cp.testing.plan_world import deny, rule

AGENT = "agent:p/a"


class Journal:
    """Envoy, kernel and agents in one: what was said to whom, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.running = True
        self.refuse: ClawkerError | None = None
        self.kernel_failures = 0
        self.busy_names: set[str] = set()
        self.changes: list[Change] = []

    async def start(self, plan: Plan) -> None:
        self.lines.append("start")

    async def open(self, plan: Plan) -> int:
        if self.refuse is not None:
            raise self.refuse
        self.lines.append("envoy")
        return 1

    async def close(self) -> int:
        self.lines.append("envoy lets go")
        return 1

    async def validate(self, plan: Plan) -> None:
        self.lines.append("judged")

    async def stage(self, plan: Plan) -> None:
        self.lines.append("staged")

    async def busy(self, destinations: Collection[str]) -> set[str]:
        return self.busy_names & set(destinations)

    def sync_routes(self, routes: Any, cidrs: Any, ports: Any, /) -> None:
        if self.kernel_failures:
            self.kernel_failures -= 1
            raise ClawkerError("full", code="ROUTE_SYNC")
        self.lines.append("kernel")

    async def set_policies(self, policies: Mapping[str, int], /) -> None:
        self.lines.append(f"agents {dict(policies)}")

    async def admit(self, plan: Plan, /) -> None:
        self.admitted = plan

    async def cut(self, change: Change, /) -> int:
        self.changes.append(change)
        self.lines.append("cut")
        return 3


class JournalNames(PolicyNames):
    """The real tables; publishing is noted."""

    def __init__(self, journal: Journal, clock: Any) -> None:
        super().__init__(clock=clock)
        self.journal = journal

    def publish(self, tables: NameTables) -> None:
        super().publish(tables)
        self.journal.lines.append("gate")


class JournalStore(RuleStore):
    """The real store; writing is noted."""

    journal: Journal
    failing = False

    def write(self, rules: Any) -> bool:
        if self.failing:
            raise ClawkerError("disk full", code="RULE_STORE_WRITE")
        self.journal.lines.append("store")
        return super().write(rules)


class World:
    def __init__(self, directory: Path) -> None:
        self.now = 1000.0
        self.journal = Journal()
        self.store = JournalStore(directory)
        self.store.journal = self.journal
        self.names = JournalNames(self.journal, lambda: self.now)
        self.reconciler = Reconciler(
            self.store,
            AllocationFiles(directory),
            self.journal,
            self.journal,
            self.journal,
            self.names,
            Topology(),
            wall=lambda: self.now,
            monotonic=lambda: self.now,
        )

    async def add(self, *rules: Any) -> Any:
        return await self.reconciler.change_stored(lambda stored: merge.add(stored, rules).rules)

    def took(self) -> list[str]:
        lines, self.journal.lines[:] = list(self.journal.lines), []
        return lines


@asynccontextmanager
async def _world(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(reconcile, "TICK_S", 0.01)
    world = World(directory)
    await world.reconciler.start()
    world.took()
    async with asyncio.TaskGroup() as group:
        group.create_task(world.reconciler.run())
        try:
            yield world
        finally:
            world.reconciler.close()


async def test_the_start_opens_the_gate_last(tmp_path: Path) -> None:
    """Envoy, then kernel, then gate."""
    world = World(tmp_path)
    await world.reconciler.start()

    assert world.took() == ["start", "kernel", "gate"]
    assert world.reconciler.version == 1


async def test_opening_goes_from_the_proxy_to_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R19: Envoy acknowledges before anything is stored, the gate comes last."""
    async with _world(tmp_path, monkeypatch) as world:
        applied = await world.add(rule("https://a.example.com"))

        assert world.took() == ["envoy", "store", "kernel", "gate", "envoy lets go", "cut"]
        assert (applied.version, applied.live, applied.connections_cut) == (2, True, 3)


async def test_closing_goes_from_the_gate_to_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R19: stored first, then the gate, the kernel, Envoy."""
    async with _world(tmp_path, monkeypatch) as world:
        await world.add(rule("https://a.example.com"), rule("tcp://b.example.com:22"))
        world.took()
        await world.reconciler.change_stored(lambda stored: [one for one in stored if one.is_http])

        assert world.took() == ["store", "gate", "kernel", "gate", "envoy", "envoy lets go", "cut"]
        ((number, lost),) = world.journal.changes[-1].lost
        assert (number, lost.dst, lost.port) == (1, "b.example.com", 22)
        await world.add(deny("https://a.example.com"))
        assert world.took()[0] == "store"


async def test_a_refusal_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither store nor kernel nor gate hears of what Envoy refuses; the version stays."""
    async with _world(tmp_path, monkeypatch) as world:
        world.journal.refuse = ClawkerError("no", code="RULE_INVALID")
        with pytest.raises(ClawkerError, match="no"):
            await world.add(rule("https://a.example.com"))

        assert world.took() == []
        assert world.reconciler.version == 1
        assert world.names.for_proxy("a.example.com") is None


async def test_a_store_that_cannot_be_written_takes_envoy_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RULE_STORE_WRITE means nothing changed: Envoy gets the old plan again."""
    async with _world(tmp_path, monkeypatch) as world:
        world.store.failing = True
        with pytest.raises(ClawkerError, match="disk full") as failure:
            await world.add(rule("https://a.example.com"))

        assert failure.value.code == "RULE_STORE_WRITE"
        assert world.took() == ["envoy", "envoy", "envoy lets go"]
        assert world.reconciler.rules == ()


async def test_what_the_kernel_refuses_is_stored_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller hears that it is stored, not live; a retry without anybody asking brings it into force."""
    async with _world(tmp_path, monkeypatch) as world:
        world.journal.kernel_failures = 1
        with pytest.raises(Unavailable, match="not in force yet"):
            await world.add(rule("https://a.example.com"))
        assert not world.reconciler.healthy
        assert not world.names.decide(1, "a.example.com").allowed
        world.now += reconcile.RETRY_S + 1
        async with asyncio.timeout(5):
            while not world.reconciler.healthy:
                await asyncio.sleep(0.005)

        assert world.names.decide(1, "a.example.com").allowed


async def test_while_envoy_is_down_its_files_are_kept_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are judged and written for its next life, in both directions; the version is not live."""
    async with _world(tmp_path, monkeypatch) as world:
        world.journal.running = False
        applied = await world.add(rule("https://a.example.com"))

        assert world.took() == ["judged", "store", "kernel", "gate", "staged", "cut"]
        assert not applied.live
        await world.add(deny("https://a.example.com"))
        assert world.took() == ["store", "gate", "kernel", "gate", "staged", "cut"]


async def test_an_agent_that_gets_rules_of_its_own_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new number is set after the kernel has the rows and before the gate answers by it."""
    async with _world(tmp_path, monkeypatch) as world:
        assert await world.reconciler.put_ephemeral(AGENT, []) == 1
        world.took()
        await world.add(rule("https://a.example.com", scope=AGENT))
        lines = world.took()

        assert lines[:5] == ["envoy", "store", "kernel", f"agents {{'{AGENT}': 2}}", "gate"]
        assert world.journal.changes[-1].moved == {AGENT: (1, 2)}


async def test_nothing_to_do_is_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rule again changes nothing anywhere."""
    async with _world(tmp_path, monkeypatch) as world:
        first = await world.add(rule("https://a.example.com"))
        world.took()
        second = await world.add(rule("https://a.example.com"))

        assert first.version == second.version
        assert "kernel" not in world.took()


async def test_idle_names_are_retired_busy_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour after the last question a listener goes, unless somebody is connected."""
    async with _world(tmp_path, monkeypatch) as world:
        await world.add(rule("tcp://*.example.com:22"))
        for name in ("idle.example.com", "busy.example.com"):
            await world.names.prepare(1, name, None)
        world.journal.busy_names = {"busy.example.com"}
        world.now += reconcile.IDLE_S + reconcile.IDLE_CHECK_S
        async with asyncio.timeout(5):
            while len(world.reconciler.plan.policies[1].concrete) == 2:
                await asyncio.sleep(0.005)

        assert set(world.reconciler.plan.policies[1].concrete) == {"busy.example.com"}


async def test_unreadable_rules_close_everything_at_start_only(tmp_path: Path) -> None:
    """R21: a broken file at start means nothing is allowed; mutations are refused."""
    (tmp_path / "egress-rules.yaml").write_text("rules: [")
    world = World(tmp_path)
    await world.reconciler.start()

    assert not world.reconciler.healthy
    assert world.reconciler.plan.policies[1].origins == ()


async def test_a_run_document_is_read_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ephemeral rules may come as YAML; they hold for the agent whatever scope they name."""
    async with _world(tmp_path, monkeypatch) as world:
        number = await world.reconciler.put_ephemeral(AGENT, "rules:\n- dst: a.example.com\n  scope: global\n")

        assert number == 2
        assert world.names.decide(2, "a.example.com").allowed
        assert not world.names.decide(1, "a.example.com").allowed


@asynccontextmanager
async def running(world: World) -> AsyncIterator[None]:
    """Work on changes while the body runs."""
    async with asyncio.TaskGroup() as group:
        group.create_task(world.reconciler.run())
        try:
            yield
        finally:
            world.reconciler.close()


async def test_rules_nobody_can_read_open_nothing(tmp_path: Path) -> None:
    """With an unreadable store preloaded rules open nothing and new ones are refused, until a repair (R21)."""
    (tmp_path / "egress-rules.yaml").write_text("rules: [")
    world = World(tmp_path)
    world.reconciler.preload("agent:p/a", "rules: [{dst: api.example.com}]\n", learn=False)
    await world.reconciler.start()
    closed = world.reconciler.plan
    async with running(world):
        with pytest.raises(ClawkerError) as refused:
            await world.reconciler.put_ephemeral("agent:p/b", "rules: [{dst: www.example.com}]\n")
        (tmp_path / "egress-rules.yaml").write_text("rules: []\n")
        await world.reconciler.reload()

    assert refused.value.code == "RULE_STORE_WRITE"
    assert not any(policy.origins for policy in closed.policies.values())
    assert not closed.routes
    assert any(policy.origins for policy in world.reconciler.plan.policies.values())


async def test_numbers_are_durable_before_the_kernel_carries_them(tmp_path: Path) -> None:
    """When the kernel is written, the allocations that its rows use are on disk already."""
    world = World(tmp_path)
    await world.reconciler.start()
    on_disk: list[bool] = []
    original = world.journal.sync_routes

    def sync(routes: Any, cidrs: Any, ports: Any, /) -> None:
        on_disk.append("db.example.com" in (tmp_path / "route-identities.yaml").read_text())
        original(routes, cidrs, ports)

    world.journal.sync_routes = sync  # type: ignore[method-assign]
    async with running(world):
        await world.reconciler.put_ephemeral("agent:p/a", "rules: [{dst: db.example.com, proto: tcp, port: '5432'}]\n")

    assert on_disk == [True]
