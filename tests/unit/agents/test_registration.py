"""`Register`: the first certificate of a container is pinned, and nothing in the request is believed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from clawker_cp.agents.database import Database
from clawker_cp.agents.identity import CONTAINER_URI, Caller, Identity, Rejected
from clawker_cp.agents.registration import Failed, Registration
from clawker_cp.agents.registry import Registry
from clawker_cp.errors import ClawkerError, Denied, InvalidInput

ID = "c" * 64
WHO = Identity(ID, "shop", "dev")
CALLER = Caller("clawker-clawkerd", (f"{CONTAINER_URI}{ID}",), "ab" * 32, "10.0.0.2")
OTHER = replace(CALLER, thumbprint="cd" * 32)


class World:
    """A registry on disk, and who was told of a registration."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database = Database(path)
        self.database.open()
        self.registry = Registry(self.database)
        self.told: list[str] = []
        self.registration = Registration(self.registry, registered=self._tell, wall=lambda: 1000.0)

    async def _tell(self, container_id: str) -> None:
        self.told.append(container_id)

    async def register(
        self, caller: Caller | None = CALLER, who: Identity | None = WHO, *, project: str = "shop", agent: str = "dev"
    ) -> None:
        await self.registration.register(project, agent, who, caller)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "cp.db")
    yield world
    world.database.close()


async def test_a_first_registration_pins_the_certificate(world: World) -> None:
    """The row has the label-derived names; the same certificate again writes nothing; another one is refused."""
    await world.register()
    row = world.registry.find(ID)
    assert row is not None
    assert (row.thumbprint, row.project, row.agent, row.registered_at) == ("ab" * 32, "shop", "dev", 1000)
    await world.register()
    assert (world.registry.find(ID), world.told) == (row, [ID, ID])
    with pytest.raises(Rejected) as caught:
        await world.register(OTHER)
    assert caught.value.event == "agent_register_thumbprint_replay"
    assert (world.registry.find(ID), world.told) == (row, [ID, ID])


async def test_an_announced_renewal_moves_the_pin(world: World) -> None:
    """The new certificate counts once it was announced, and the old one no longer does."""
    await world.register()
    world.registry.announce_renewal(ID, "cd" * 32, 2000)
    await world.register(OTHER)
    row = world.registry.find(ID)
    assert row is not None and row.thumbprint == "cd" * 32
    with pytest.raises(Rejected):
        await world.register()


@pytest.mark.parametrize(
    ("caller", "names", "event"),
    [
        (CALLER, {"project": "other"}, "agent_register_request_label_mismatch"),
        (CALLER, {"agent": "other"}, "agent_register_request_label_mismatch"),
        (CALLER, {"project": "sho", "agent": "p.dev"}, "agent_register_request_label_mismatch"),
        (replace(CALLER, uris=()), {}, "agent_register_no_container_san"),
        (replace(CALLER, uris=(CONTAINER_URI,)), {}, "agent_register_malformed_container_san"),
        (replace(CALLER, uris=(f"{CONTAINER_URI}XYZ",)), {}, "agent_register_malformed_container_san"),
        (replace(CALLER, uris=(f"{CONTAINER_URI}{'d' * 64}",)), {}, "agent_register_container_id_mismatch"),
    ],
)
async def test_what_contradicts_the_identity_is_refused(
    world: World, caller: Caller, names: dict[str, Any], event: str
) -> None:
    """By name of the check in the log, alike for the caller, and nothing is stored."""
    with pytest.raises(Rejected, match="registration rejected") as caught:
        await world.register(caller, **names)
    assert caught.value.event == event
    assert world.registry.snapshot() == [] and world.told == []


async def test_what_is_missing_has_its_own_answer(world: World) -> None:
    """A name that is none, no identity, no leaf: three different errors."""
    for agent in ("", "-x", "a b", "a\n"):
        with pytest.raises(InvalidInput, match="register: invalid agent name"):
            await world.register(agent=agent)
    with pytest.raises(Failed, match="register: identity not resolved"):
        await world.register(who=None)
    with pytest.raises(Denied, match="register: identity check failed"):
        await world.register(caller=None)


async def test_a_row_that_cannot_be_meant_is_replaced(world: World) -> None:
    """It is evicted with a line in the log, and the container registers anew."""
    with sqlite3.connect(world.path) as other:
        other.execute("INSERT INTO agents VALUES ('xyz', ?, 'dev', 'shop', 1, 1)", (ID,))
    other.close()
    with structlog.testing.capture_logs() as logs:
        await world.register()
    assert "agentregistry_row_skipped" in {line["event"] for line in logs}
    row = world.registry.find(ID)
    assert row is not None and row.thumbprint == "ab" * 32


async def test_a_certificate_of_another_container_is_not_stored_twice(world: World) -> None:
    """One certificate stands for one container: the second one's row is refused by the file."""
    await world.register()
    second = Identity("d" * 64, "shop", "dev")
    with pytest.raises(Failed, match="register: persist failed"):
        await world.register(replace(CALLER, uris=(f"{CONTAINER_URI}{'d' * 64}",)), second)
    assert len(world.registry.snapshot()) == 1


async def test_a_file_that_cannot_be_read_is_no_unknown_agent(world: World) -> None:
    """The answer is our failure with a constant text, not a refusal and not a new row."""
    world.database.close()
    with pytest.raises(ClawkerError, match="register: lookup failed") as caught:
        await world.register()
    assert str(world.path) not in caught.value.message and world.told == []
