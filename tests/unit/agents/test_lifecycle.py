"""A sandbox is enrolled before anything runs in it, and its row goes only after its death."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from clawker_cp.agents.lifecycle import LifeRequest, SandboxLives
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.errors import NotFound, Unavailable


@dataclass(frozen=True)
class Sandbox:
    id: str = "id1"
    project: str = "p"
    agent: str = "a"
    address: str = "198.51.100.1"
    cgroup_id: int = 11


class World:
    """Engine, policy and kernel in one, writing down the order of what they are asked."""

    def __init__(self, failing: str = "") -> None:
        self.steps: list[str] = []
        self.failing = failing
        self.roster = Roster()
        self.lives = SandboxLives(self, self, self, self.roster, self.settle)

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name == self.failing:
            raise Unavailable(f"{name} fails")

    async def create(self, spec: Any) -> Sandbox:
        self._step("create")
        return Sandbox()

    async def run(self, sandbox_id: str, streams: tuple[int, int, int]) -> None:
        self._step("run")

    async def wait(self, sandbox_id: str) -> int:
        self._step("wait")
        return 42

    async def signal(self, sandbox_id: str, signo: int) -> None:
        self._step(f"signal {signo}")

    async def stop(self, sandbox_id: str, *, grace_s: float) -> None:
        self._step("stop")

    async def remove(self, sandbox_id: str, *, force: bool, grace_s: float) -> None:
        self._step("remove")

    async def put_ephemeral(self, key: str, rules: str, *, learn: bool) -> int:
        self._step("rules")
        return 5

    def policy_of(self, key: str) -> int:
        return 5

    async def settle(self, sandbox_id: str) -> None:
        assert self.roster.by_id(sandbox_id) is not None or self.failing in {"rules", "enroll"}
        self._step("settle")

    async def drop_ephemeral(self, key: str) -> None:
        self._step("drop")

    async def enroll(self, agent: EnrolledAgent, sandbox: Any) -> None:
        assert agent.policy == 5
        self._step("enroll")

    async def withdraw(self, agent: EnrolledAgent) -> None:
        self._step("withdraw")


REQUEST = LifeRequest(spec=None, rules="")
END = ["stop", "remove", "settle", "withdraw", "drop"]


async def test_a_whole_life_keeps_the_order() -> None:
    """Rules and row precede the process; death precedes the row's end; the exit code is the command's."""
    world = World()
    async with world.lives.prepared(REQUEST) as sandbox:
        assert world.roster.by_id(sandbox.id) is not None
        await world.lives.launch(sandbox.id, (0, 1, 2))
    await world.lives.signal("id1", 15)
    assert await world.lives.finish("id1") == 42
    assert world.steps == ["create", "rules", "enroll", "run", "signal 15", "wait", *END]
    assert len(world.lives) == len(world.roster) == 0


@pytest.mark.parametrize("failing", ["rules", "enroll", "run"])
async def test_a_failed_start_leaves_nothing(failing: str) -> None:
    """Whatever step fails, everything made before it is taken away."""
    world = World(failing)
    with pytest.raises(Unavailable, match=failing):
        async with world.lives.prepared(REQUEST) as sandbox:
            await world.lives.launch(sandbox.id, (0, 1, 2))
    assert world.steps[-5:] == END
    assert not world.lives.knows("id1") and len(world.roster) == 0


@pytest.mark.parametrize(("failing", "steps"), [("stop", ["stop"]), ("remove", ["stop", "remove", "settle"])])
async def test_what_cannot_be_killed_or_removed_keeps_its_row_and_its_rules(failing: str, steps: list[str]) -> None:
    """While something of a sandbox may live, its enforcement stays as it was (I4), and it stays known."""
    world = World(failing)
    await world.lives.adopt(world.lives.adoptee(Sandbox(), REQUEST), Sandbox())
    await world.lives.stop("id1", grace_s=0)
    assert world.steps == ["enroll", *steps]
    assert world.roster.by_id("id1") is not None and world.lives.knows("id1")


async def test_what_could_not_be_taken_away_is_tried_again_until_it_is() -> None:
    """Only what failed is; nothing of the later steps is done twice, and who asks meanwhile tries too."""
    world = World("remove")
    await world.lives.adopt(world.lives.adoptee(Sandbox(), REQUEST), Sandbox())
    idle = await world.lives.retry()
    await world.lives.stop("id1", grace_s=0)
    tried = await world.lives.retry()
    code = await world.lives.finish("id1")
    world.failing = ""
    ended = [await world.lives.retry() for _ in range(2)]

    failed = ["stop", "remove", "settle"]
    assert (idle, tried, code, ended) == ([], [], 42, [["id1"], []])
    assert world.steps == ["enroll", *failed, *failed, "wait", *failed, *END]
    assert not world.lives.knows("id1") and len(world.roster) == 0


@pytest.mark.parametrize("failing", ["settle", "withdraw"])
async def test_a_failing_later_step_does_not_stop_the_others(failing: str) -> None:
    """Once a sandbox is dead, one step's failure leaves no other undone, and an end is only done once."""
    world = World(failing)
    await world.lives.adopt(world.lives.adoptee(Sandbox(), REQUEST), Sandbox())
    await world.lives.stop("id1", grace_s=0)
    await world.lives.stop("id1", grace_s=0)
    assert world.steps == ["enroll", *END]
    assert not world.lives.knows("id1")


async def test_an_adopted_sandbox_keeps_its_rules_and_gets_its_row_again() -> None:
    """Adoption asks for no rule change: the rules were in force before it."""
    world = World()
    await world.lives.adopt(world.lives.adoptee(Sandbox(), REQUEST), Sandbox())
    assert world.steps == ["enroll"]
    assert world.lives.knows("id1")


async def test_an_unknown_sandbox_is_not_found() -> None:
    """Signals and waits name the sandbox that is not here."""
    with pytest.raises(NotFound, match="nobody"):
        await World().lives.signal("nobody", 15)
