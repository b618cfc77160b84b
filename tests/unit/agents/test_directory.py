"""One reference, one agent: anything else is an error that says what to write instead."""

from __future__ import annotations

import pytest

from clawker_cp.agents.directory import by_container, full_name, resolve
from clawker_cp.agents.roster import EnrolledAgent
from clawker_cp.errors import InvalidInput, NotFound


def agent(agent_id: str, project: str, name: str) -> EnrolledAgent:
    return EnrolledAgent(agent_id, project, name, "198.51.100.1", 1, 1)


ONE = agent("a" * 64, "shop", "dev")
TWO = agent("a" * 20 + "b" * 44, "", "dev")
BOTH = [ONE, TWO]


@pytest.mark.parametrize(
    ("reference", "found"),
    [("a" * 64, ONE), ("a" * 20 + "b", TWO), ("clawker.shop.dev", ONE), ("clawker.dev", TWO)],
)
def test_an_agent_is_found_by_id_prefix_and_name(reference: str, found: EnrolledAgent) -> None:
    """A full id, a long enough prefix and the full name all lead to the one agent."""
    assert by_container(reference, BOTH) is found


@pytest.mark.parametrize("reference", ["b" * 64, "a" * 11, "dev", "shop"])
def test_a_short_prefix_or_half_a_name_is_nobody(reference: str) -> None:
    """Eleven characters or an unqualified name do not count, and the code says so."""
    with pytest.raises(NotFound) as raised:
        by_container(reference, BOTH)
    assert raised.value.code == "AGENT_NOT_FOUND"


def test_a_prefix_of_two_is_refused() -> None:
    """An ambiguous prefix names the candidates."""
    with pytest.raises(InvalidInput, match="means 2 agents"):
        by_container("a" * 12, BOTH)


def test_names_that_compose_alike_stay_apart() -> None:
    """(a, b.c) and (a.b, c) share a full name; project and agent tell them apart."""
    first, second = agent("1" * 64, "a", "b.c"), agent("2" * 64, "a.b", "c")
    assert full_name("a", "b.c") == full_name("a.b", "c")
    with pytest.raises(InvalidInput):
        by_container("clawker.a.b.c", [first, second])
    assert resolve("", "a.b", "c", [first, second]) is second


@pytest.mark.parametrize(
    ("container", "project", "name"), [("", "", ""), ("x", "p", "a"), ("x", "", "a"), ("", "p", "")]
)
def test_a_reference_names_one_way(container: str, project: str, name: str) -> None:
    """Nothing at all, half a name, or two ways at once are refused."""
    with pytest.raises(InvalidInput):
        resolve(container, project, name, BOTH)
