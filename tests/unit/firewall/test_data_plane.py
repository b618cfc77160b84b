"""
Tests of the order in which a change is applied, and of what happens when a part of it fails.

Stand-ins keep a journal of what they are told; rules, compile and allocations are real.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from clawker_cp.errors import CapacityExceeded, ClawkerError, Unavailable
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.changes import Applied, Progress, Wanted
from clawker_cp.firewall.data_plane import RETRY_S, DataPlane
from clawker_cp.firewall.plan import Topology
from clawker_cp.testing.plan_world import deny, rule
from clawker_cp.testing.policy_journal import Journal, JournalNames

AGENT = "agent:p/a"
A, B = rule("https://a.example.com"), rule("tcp://b.example.com:22")


class World:
    """A data plane over a journal, with a clock that stands still."""

    def __init__(self, directory: Path) -> None:
        self.now = 1000.0
        self.journal = Journal()
        self.took = self.journal.took
        self.disk_full = False
        self.names = JournalNames(self.journal, lambda: self.now)
        self.plane = DataPlane(
            AllocationFiles(directory), self.journal, self.journal, self.journal, self.names, Topology(),
            wall=lambda: self.now, monotonic=lambda: self.now,
        )  # fmt: skip

    def write(self) -> None:
        if self.disk_full:
            raise ClawkerError("disk full", code="RULE_STORE_WRITE")
        self.journal.lines.append("store")

    async def hold(self, *rules: Any, **options: Any) -> Applied:
        """Make these the stored rules."""
        return await self.plane.apply(replace(self.plane.wanted, stored=rules), write=self.write, **options)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    await made.plane.start(Wanted())
    made.took()
    return made


async def test_the_start_opens_the_gate_last(tmp_path: Path) -> None:
    """Envoy, then kernel, then gate; before that no plan is in force."""
    world = World(tmp_path)
    with pytest.raises(Unavailable, match="no policy"):
        _ = world.plane.compiled
    await world.plane.start(Wanted(stored=(A,)))

    assert world.took() == ["start", "kernel", "gate"]
    assert (world.plane.started, world.plane.version) == (True, 1)


async def test_opening_goes_from_the_proxy_to_the_gate(world: World) -> None:
    """R19: Envoy acknowledges before anything is stored, the gate comes last."""
    progress = Progress()
    applied = await world.hold(A, progress=progress)

    assert world.took() == ["envoy", "store", "kernel", "gate", "envoy lets go", "cut"]
    assert (applied.version, applied.live, applied.connections_cut) == (2, True, 3)
    assert progress.saved


async def test_closing_goes_from_the_gate_to_the_proxy(world: World) -> None:
    """R19: stored first, then the gate, the kernel, Envoy."""
    await world.hold(A, B)
    world.took()
    await world.hold(A)

    assert world.took() == ["store", "gate", "kernel", "gate", "envoy", "envoy lets go", "cut"]
    ((number, lost),) = world.journal.changes[-1].lost
    assert (number, lost.dst, lost.port) == (1, "b.example.com", 22)
    await world.hold(A, deny("https://a.example.com"))
    assert world.took()[0] == "store"


async def test_nothing_to_do_tells_nobody(world: World) -> None:
    """The same rules again are written, not applied, and are no version; by force they are applied."""
    await world.hold(A)
    world.took()
    again = await world.hold(A)

    assert (again.version, world.took()) == (2, ["store"])
    await world.plane.apply(world.plane.wanted, force=True)
    assert (world.plane.version, "kernel" in world.took()) == (2, True)


async def test_a_refusal_is_no_change(world: World) -> None:
    """Neither store nor kernel nor gate hears of what Envoy refuses; the version stays."""
    world.journal.refuse = ClawkerError("no", code="RULE_INVALID")
    with pytest.raises(ClawkerError, match="no"):
        await world.hold(A)

    assert world.took() == []
    assert world.plane.version == 1
    assert world.names.for_proxy("a.example.com") is None


async def test_what_does_not_compile_is_told_to_nobody(world: World) -> None:
    """More than the data plane holds is a refusal with its limit, and `problems` says the same beforehand."""
    world.plane.topology = Topology(max_policies=1)
    wanted = Wanted(stored=(rule("https://a.example.com", scope=AGENT),), agents=frozenset({AGENT}))
    problems = world.plane.problems(wanted)
    with pytest.raises(CapacityExceeded):
        await world.plane.apply(wanted, write=world.write)

    assert [one.code for one in problems] == ["CAPACITY"]
    assert world.took() == []


async def test_a_store_that_cannot_be_written_takes_envoy_back(world: World) -> None:
    """RULE_STORE_WRITE means nothing changed: Envoy gets the old plan again."""
    world.disk_full = True
    with pytest.raises(ClawkerError, match="disk full") as failure:
        await world.hold(A)

    assert failure.value.code == "RULE_STORE_WRITE"
    assert world.took() == ["envoy", "envoy", "envoy lets go"]
    assert world.plane.wanted.rules == ()


async def test_what_the_kernel_refuses_is_accepted_and_tried_again(world: World) -> None:
    """The caller hears that it is stored, not live; once some seconds are over `tend` brings it into force."""
    world.journal.kernel_failures = 1
    with pytest.raises(Unavailable, match="not in force yet"):
        await world.hold(A)
    await world.plane.tend()
    too_early = world.plane.behind, world.names.decide(1, "a.example.com").allowed
    world.took()
    world.now += RETRY_S + 1
    await world.plane.tend()

    assert too_early == (True, False)
    assert world.took() == ["envoy", "kernel", "gate", "envoy lets go", "cut"]
    assert (world.plane.behind, world.names.decide(1, "a.example.com").allowed) == (False, True)


async def test_what_is_tried_again_moves_agents_and_cuts_connections(world: World) -> None:
    """An agent's number and its forbidden connections are those of the whole change, however late it is in force."""
    await world.plane.apply(replace(world.plane.wanted, agents=frozenset({AGENT})))
    await world.hold(B)
    world.journal.kernel_failures = 1
    with pytest.raises(Unavailable):
        await world.hold(rule("https://a.example.com", scope=AGENT))
    world.now += RETRY_S + 1
    world.took()
    await world.plane.tend()

    assert f"agents {{'{AGENT}': 2}}" in world.took()
    assert world.journal.changes[-1].moved == {AGENT: (1, 2)}
    assert [(number, lost.dst) for number, lost in world.journal.changes[-1].lost] == [(1, "b.example.com")]


async def test_every_rule_of_an_accepted_change_is_logged(world: World) -> None:
    """Added, changed and removed rules have a line each, also when the change is not in force yet."""
    with structlog.testing.capture_logs() as lines:
        await world.hold(A)
        world.journal.kernel_failures = 1
        with pytest.raises(Unavailable):
            await world.hold(replace(A, source="control"), B)
        await world.hold(B)

    told = [(one["event"], one["dst"]) for one in lines if one["event"].startswith("rule_")]
    assert told == [
        ("rule_added", A.dst),
        ("rule_added", B.dst), ("rule_modified", A.dst),
        ("rule_removed", A.dst),
    ]  # fmt: skip


async def test_while_envoy_is_down_its_files_are_kept_current(world: World) -> None:
    """Changes are judged and written for its next life, in both directions; the version is not live."""
    world.journal.running = False
    applied = await world.hold(A)

    assert world.took() == ["judged", "store", "kernel", "gate", "staged", "cut"]
    assert not applied.live
    await world.hold(A, deny("https://a.example.com"))
    assert world.took() == ["store", "gate", "kernel", "gate", "staged", "cut"]


@pytest.mark.parametrize(
    ("ends_at", "told"),
    [
        ("envoy", ["judged", "store", "kernel", "gate", "staged", "cut"]),
        ("envoy lets go", ["envoy", "store", "kernel", "gate", "staged", "cut"]),
    ],
)
async def test_an_envoy_that_ends_inside_a_change_is_one_that_is_down(
    world: World, ends_at: str, told: list[str]
) -> None:
    """The change is made and written for its next life; whoever asked for it is not refused."""
    world.journal.ends_at = ends_at
    applied = await world.hold(A)

    assert world.took() == told
    assert not applied.live and not world.plane.behind


@pytest.mark.parametrize("what", ["judgement", "store"])
async def test_an_envoy_that_ended_inside_a_refused_change_comes_back_with_what_holds(world: World, what: str) -> None:
    """It may have been given files of the change by then: those that hold are put back for its next life."""
    await world.hold(A)
    world.journal.ends_at = "envoy"
    world.disk_full = what == "store"
    world.journal.judgement = ClawkerError("no", code="RULE_INVALID") if what == "judgement" else None
    world.took()
    with pytest.raises(ClawkerError, match="disk full" if what == "store" else "no"):
        await world.hold(A, B)

    assert world.took() == ["judged", "staged"]
    assert world.journal.staged == world.plane.compiled.plan and world.plane.wanted.rules == (A,)


async def test_an_envoy_that_ends_inside_a_closing_change_does_not_undo_it(world: World) -> None:
    """What is taken away is gone from store, gate and kernel, and from what Envoy finds when it comes back."""
    await world.hold(A)
    world.took()
    world.journal.ends_at = "envoy"
    applied = await world.hold(A, deny("https://a.example.com"))

    assert world.took() == ["store", "gate", "kernel", "gate", "staged", "cut"]
    assert not applied.live and not world.plane.behind


async def test_numbers_are_durable_before_the_kernel_carries_them(world: World, tmp_path: Path) -> None:
    """When the kernel is written, the allocations that its rows use are on disk already."""
    on_disk: list[bool] = []
    world.journal.before_kernel = lambda: on_disk.append(
        "b.example.com" in (tmp_path / "route-identities.yaml").read_text()
    )
    await world.hold(B)

    assert on_disk == [True]
