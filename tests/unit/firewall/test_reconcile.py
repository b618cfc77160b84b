"""
Tests of the verbs that change policy, and of what time changes.

Stand-ins keep a journal of what they are told; rules, compile, store and allocations are real.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.errors import ClawkerError, Unavailable
from clawker_cp.firewall import data_plane, merge, reconcile
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.plan import Topology
from clawker_cp.firewall.reconcile import Reconciler
from clawker_cp.firewall.rules import Rule, RuleInvalid
from clawker_cp.firewall.store import RuleStore
from clawker_cp.testing.plan_world import rule
from clawker_cp.testing.policy_journal import Journal, JournalNames

AGENT = "agent:p/a"


class World:
    def __init__(self, directory: Path) -> None:
        self.now = 1000.0
        self.journal = Journal()
        self.store = RuleStore(directory)
        self.names = JournalNames(self.journal, lambda: self.now)
        self.took = self.journal.took
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


@asynccontextmanager
async def running(world: World) -> AsyncIterator[None]:
    """Work on changes while the body runs."""
    async with asyncio.TaskGroup() as group:
        group.create_task(world.reconciler.run())
        try:
            yield
        finally:
            world.reconciler.close()


@asynccontextmanager
async def _world(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(reconcile, "TICK_S", 0.01)
    world = World(directory)
    await world.reconciler.start()
    world.took()
    async with running(world):
        yield world


async def test_what_fell_behind_is_brought_into_force_without_anybody_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that the kernel refused makes the reconciler unhealthy until it has tried again."""
    async with _world(tmp_path, monkeypatch) as world:
        world.journal.kernel_failures = 1
        with pytest.raises(Unavailable, match="not in force yet"):
            await world.add(rule("https://a.example.com"))
        healthy_before = world.reconciler.healthy
        world.now += data_plane.RETRY_S + 1
        await world.journal.until("cut")

        assert not healthy_before
        assert world.reconciler.healthy


async def test_an_agents_document_with_problems_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules that cannot be read leave their agent unknown."""
    async with _world(tmp_path, monkeypatch) as world:
        with pytest.raises(RuleInvalid):
            await world.reconciler.put_ephemeral(AGENT, "rules:\n- dst: '-bad-'\n")

        assert AGENT not in world.reconciler.plan.agents
        assert world.took() == []


async def test_an_agents_rules_outlast_a_refusal_of_the_kernel_and_go_with_their_agent_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was accepted counts for the next agent's change as well, whether it was in force by then or not."""
    async with _world(tmp_path, monkeypatch) as world:
        world.journal.kernel_failures = 1
        with pytest.raises(Unavailable, match="not in force yet"):
            await world.reconciler.put_ephemeral(AGENT, [{"dst": "a.example.com"}])
        await world.reconciler.put_ephemeral("agent:p/b", [{"dst": "b.example.com"}])
        both = {one.dst: one.scope for one in world.reconciler.rules}
        await world.reconciler.drop_ephemeral(AGENT)

        assert both == {"a.example.com": AGENT, "b.example.com": "agent:p/b"}
        assert [one.dst for one in world.reconciler.rules] == ["b.example.com"]


async def test_agents_that_end_together_are_forgotten_in_one_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many wait, proxy and kernel are asked once; an unknown one among them is fine."""
    async with _world(tmp_path, monkeypatch) as world:
        keys = [f"agent:p/{name}" for name in "abc"]
        for key in keys:
            await world.reconciler.put_ephemeral(key, [{"dst": f"{key[-1]}.example.com"}])
        world.took()
        async with asyncio.TaskGroup() as group:
            for key in [*keys[:2], "agent:p/nobody"]:
                group.create_task(world.reconciler.drop_ephemeral(key))
        lines = world.took()

        assert [one.dst for one in world.reconciler.rules] == ["c.example.com"]
        assert set(world.reconciler.plan.agents) == {"agent:p/c"}
        assert lines.count("kernel") == 1, lines


async def test_an_agent_that_gets_rules_of_its_own_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new number is set after the kernel has the rows and before the gate answers by it."""
    async with _world(tmp_path, monkeypatch) as world:
        assert await world.reconciler.put_ephemeral(AGENT, []) == 1
        world.took()
        await world.add(rule("https://a.example.com", scope=AGENT))
        lines = world.took()

        assert lines[:4] == ["envoy", "kernel", f"agents {{'{AGENT}': 2}}", "gate"]
        assert world.journal.changes[-1].moved == {AGENT: (1, 2)}


async def test_rules_are_changed_and_judged_off_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows with the number of rules runs in a thread: the loop serves others meanwhile."""
    async with _world(tmp_path, monkeypatch) as world:
        threads: list[threading.Thread] = []

        def change(stored: Sequence[Rule]) -> Sequence[Rule]:
            threads.append(threading.current_thread())
            return (*stored, rule("https://a.example.com"))

        assert await world.reconciler.judge_stored(change) == []
        await world.reconciler.change_stored(change)

        assert len(threads) == 2
        assert threading.current_thread() not in threads


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
        world.took()
        await world.journal.until("envoy lets go")

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
