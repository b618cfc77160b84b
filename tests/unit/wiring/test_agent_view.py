"""Agents as services see them, and revocation: the authority's list first, caches after it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.agents.database import Database
from clawker_cp.agents.registry import RegisteredAgent, Registry
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.errors import InvalidInput, NotFound
from clawker_cp.wiring.agent_view import AgentView, TokenRevocation

RUNNING = EnrolledAgent("a" * 64, "p", "a", "198.51.100.7", 7, 3)


class Control:
    """Reasons of quarantine, and verbs."""

    def quarantine_reason(self, agent_id: str) -> str:
        return "odd" if agent_id == RUNNING.id else ""

    async def quarantine(self, agent: EnrolledAgent, reason: str) -> int:
        return 4

    async def release(self, agent: EnrolledAgent) -> None:
        return


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    database = Database(tmp_path / "cp.db")
    database.open()
    registry = Registry(database)
    registry.add(RegisteredAgent("ab" * 32, RUNNING.id, "a", "p", 1, 50))
    registry.add(RegisteredAgent("cd" * 32, "b" * 64, "b", "p", 1, 60))
    yield registry
    database.close()


@pytest.fixture
def view(registry: Registry) -> AgentView:
    roster = Roster()
    roster.put(RUNNING)
    return AgentView(roster, registry, Control(), engine="host", enrolled=lambda one: one.cgroup_id == 7)


async def test_running_agents_are_joined_with_what_is_stored(view: AgentView) -> None:
    """Registration, last frame and quarantine beside what the kernel says."""
    (session,) = await view.sessions(everything=False)
    assert (session.running, session.enrolled, session.registered) == (True, True, True)
    assert (session.thumbprint, session.last_seen_unix, session.quarantine_reason) == ("ab" * 32, 50, "odd")


async def test_registered_ones_that_do_not_run_are_shown_on_demand(view: AgentView) -> None:
    """As neither running nor enrolled."""
    everybody = await view.sessions(everything=True)
    assert [(one.agent.agent, one.running, one.enrolled) for one in everybody] == [
        ("a", True, True),
        ("b", False, False),
    ]


def test_only_running_agents_are_found(view: AgentView) -> None:
    """A registered one that is gone cannot be commanded."""
    assert view.find("", "p", "a") is RUNNING
    with pytest.raises(NotFound):
        view.find("", "p", "b")


class Journal:
    def __init__(self) -> None:
        self.told: list[Any] = []

    async def bar(self, kind: str, id_: str) -> None:
        self.told.append((kind, id_))

    def revoke(self, **selector: Any) -> int:
        self.told.append(selector)
        return 2


async def test_the_authority_hears_of_a_revocation_before_the_caches() -> None:
    """Else a question in between would find the token active and keep it."""
    journal = Journal()
    revocation = TokenRevocation(journal, [journal, journal])
    digest = sha256(b"t").digest()
    assert await revocation.revoke(token="t") == 4
    assert journal.told == [("digest", digest.hex()), {"token_sha256": digest}, {"token_sha256": digest}]
    for selector, barred in (
        ({"token_sha256": digest.hex()}, ("digest", digest.hex())), ({"client_id": "c"}, ("client", "c")),
        ({"everything": True}, ("all", "")),
    ):  # fmt: skip
        journal.told.clear()
        await revocation.revoke(**selector)
        assert journal.told[0] == barred and len(journal.told) == 3


async def test_a_revocation_that_is_given_up_drops_what_is_cached() -> None:
    """Its caller left while the authority wrote: what is written by then is not served from a cache."""

    class Slow(Journal):
        async def bar(self, kind: str, id_: str) -> None:
            writes.set()
            await asyncio.Event().wait()

    writes, journal = asyncio.Event(), Slow()
    revoking = asyncio.create_task(TokenRevocation(journal, [journal]).revoke(client_id="c"))
    await writes.wait()
    revoking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await revoking

    assert journal.told == [{"client_id": "c"}]


@pytest.mark.parametrize("text", ["xyz", "ab", "g" * 64, "a" * 63])
async def test_a_digest_that_is_none_revokes_nothing(text: str) -> None:
    """The error names the field."""
    journal = Journal()
    with pytest.raises(InvalidInput, match="token_sha256"):
        await TokenRevocation(journal, [journal]).revoke(token_sha256=text)
    assert journal.told == []
