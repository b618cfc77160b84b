"""Quarantine: who ends it depends on who began it, and it survives a restart."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from clawker_cp.agents.database import Database
from clawker_cp.agents.quarantines import EXPOSURE, OPERATOR, TRUST, Quarantines
from clawker_cp.errors import InvalidInput


@pytest.fixture
def quarantines(database: Database) -> Quarantines:
    return Quarantines(database)


def test_a_quarantine_is_read_back_after_a_restart(quarantines: Quarantines, database: Database) -> None:
    """Cause, reason and time are on disk before anybody is told."""
    quarantines.put("c1", OPERATOR, "looked odd", 42)
    database.close()
    database.open()
    (row,) = Quarantines(database).all().values()
    assert (row.container_id, row.cause, row.reason, row.since) == ("c1", OPERATOR, "looked odd", 42)


def test_a_registration_ends_distrust_only(quarantines: Quarantines) -> None:
    """`trust` ends with a registration; an operator's and an exposure's quarantine stay."""
    for name, cause in (("a", TRUST), ("b", EXPOSURE), ("c", OPERATOR)):
        quarantines.put(name, cause, "", 1)
        assert quarantines.registered(name) is (cause == TRUST)
    assert set(quarantines.all()) == {"b", "c"}


def test_an_operators_word_is_not_overwritten(quarantines: Quarantines) -> None:
    """A later automatic cause does not make an operator's quarantine one that ends by itself."""
    quarantines.put("c1", OPERATOR, "mine", 1)
    quarantines.put("c1", TRUST, "theirs", 2)
    row = quarantines.get("c1")
    assert row is not None and (row.cause, row.reason) == (OPERATOR, "mine")


def test_a_release_remembers_what_was_accepted(quarantines: Quarantines) -> None:
    """After a release the same exposures are accepted, one more is not; forgetting ends that."""
    quarantines.put("c1", EXPOSURE, "privileged", 1)
    assert quarantines.release("c1", ["privileged", "host_pid"]) is True
    assert quarantines.get("c1") is None and quarantines.all() == {}
    assert quarantines.accepts("c1", ["privileged"])
    assert not quarantines.accepts("c1", ["privileged", "engine_socket"])
    quarantines.forget("c1")
    assert not quarantines.accepts("c1", ["privileged"])


def test_a_release_of_a_free_agent_says_so(quarantines: Quarantines) -> None:
    """Nothing was quarantined, nothing is remembered."""
    assert quarantines.release("c1") is False


def test_an_unknown_cause_is_refused(quarantines: Quarantines) -> None:
    """The error names the causes there are."""
    with pytest.raises(InvalidInput, match="trust, exposure, operator"):
        quarantines.put("c1", "mood", "", 1)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads change places after a microsecond instead of five milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_an_operators_word_holds_among_threads(quarantines: Quarantines) -> None:
    """Said at the same time as an automatic cause it wins, whichever statement comes first."""
    names = [f"c{number}" for number in range(300)]
    together = threading.Barrier(2, timeout=20)

    def say(cause: str) -> None:
        for name in names:
            together.wait()
            quarantines.put(name, cause, "", 1)

    with ThreadPoolExecutor(2) as pool:
        for said in [pool.submit(say, cause) for cause in (EXPOSURE, OPERATOR)]:
            said.result(timeout=60)

    assert {row.cause for row in quarantines.all().values()} == {OPERATOR}
