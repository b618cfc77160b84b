"""An agent is found by id, address or cgroup only when the match is unique."""

from __future__ import annotations

from clawker_cp.agents.roster import EnrolledAgent, Roster


def agent(name: str, address: str = "198.51.100.1", cgroup_id: int = 1) -> EnrolledAgent:
    return EnrolledAgent(id=name, project="p", agent=name, address=address, cgroup_id=cgroup_id, policy=7)


def test_an_agent_is_found_every_way() -> None:
    """Id, address, cgroup and key all lead to the same agent."""
    roster, one = Roster(), agent("one")
    roster.put(one)
    assert roster.by_id("one") is roster.by_address("198.51.100.1") is roster.by_cgroup(1) is one
    assert roster.with_key("agent:p/one") == [one]
    assert list(roster) == [one] and len(roster) == 1
    assert (roster.policy_of("one"), roster.policy_of("nobody")) == (7, 0)


def test_a_shared_address_or_cgroup_is_nobodys_until_unique_again() -> None:
    """Two, or three, agents on one address answer None; the last one left is found again."""
    roster = Roster()
    for name in ("one", "two", "three"):
        roster.put(agent(name))
        assert (roster.by_address("198.51.100.1") is None) == (len(roster) > 1)
    assert roster.by_cgroup(1) is None
    roster.remove("one")
    roster.remove("three")
    assert roster.by_address("198.51.100.1") is roster.by_cgroup(1) is roster.by_id("two")


def test_an_update_moves_the_indexes() -> None:
    """A changed address is found at the new place only, and an unknown id changes nothing."""
    roster = Roster()
    roster.put(agent("one"))
    changed = roster.update("one", address="198.51.100.2", policy=8)
    assert changed is not None and changed.policy == 8
    assert roster.by_address("198.51.100.1") is None
    assert roster.by_address("198.51.100.2") is changed
    assert roster.update("nobody", policy=1) is None
    roster.remove("nobody")
    assert len(roster) == 1


def test_a_bypass_ends_at_its_time() -> None:
    """A bypass holds strictly before its end on the monotonic clock."""
    now = [99]
    one = EnrolledAgent("i", "p", "a", "198.51.100.1", 1, 1, bypass_until_ns=100, clock_ns=lambda: now[0])
    assert one.bypassed
    now[0] = 100
    assert not one.bypassed
