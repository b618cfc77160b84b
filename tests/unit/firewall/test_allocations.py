"""Sticky numbers: policies, listeners in their bands, identities (contract 1.1, 7.9; R4)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.firewall.allocations import (
    BANDS,
    EMPTY,
    IDENTITY_LAST,
    NEVER,
    REST_S,
    Allocations,
    Allocator,
    ExhaustedError,
    egress_port,
    listener_ports,
)
from clawker_cp.firewall.plan import IDENTITY_FIRST, TCP, UDP


def step(
    snapshot: Allocations, listeners: Sequence[str] = (), policies: Sequence[str] = (), now: float = 0.0
) -> Allocations:
    """One compile that asks for these."""
    allocator = Allocator(snapshot, now=now)
    for dst in listeners:
        allocator.listener(TCP, dst, 22)
    for key in policies:
        allocator.policy(key)
    return allocator.finish()


def test_the_egress_listener_follows_from_the_policy_number() -> None:
    """10000 for policy 1, 12000 + (k - 2) for the others."""
    assert [egress_port(number) for number in (1, 2, 3, 1001)] == [10000, 12000, 12001, 12999]


def test_listener_bands_are_those_of_the_contract_without_the_three_ports_of_others() -> None:
    """Lowest first, small band before large."""
    tcp, udp = list(listener_ports(TCP)), list(listener_ports(UDP))
    assert (tcp[0], tcp[998], tcp[999], tcp[-1]) == (10001, 10999, 13000, 22999)
    assert (udp[0], udp[998], udp[999], udp[-1]) == (11001, 11999, 23000, 31999)
    assert {18374, 18901, 18902} == NEVER and NEVER.isdisjoint(tcp + udp)
    assert not set(tcp) & set(range(12000, 13000)) and 10000 not in tcp


def test_the_global_policy_is_one_and_others_follow() -> None:
    """In the order they are asked for."""
    allocator = Allocator(EMPTY)
    assert [allocator.policy(key) for key in ("global", "project:p", "agent:p/a", "project:p")] == [1, 2, 3, 2]


def test_policy_numbers_go_round_before_they_are_reused() -> None:
    """A released number is the last to be taken again."""
    one = step(EMPTY, policies=["project:a"])
    two = step(one, policies=["project:b"], now=1.0)
    assert dict(two.policies) == {"project:b": 3}
    three = step(two, policies=["project:b", "project:c"], now=1000.0)
    assert three.policies["project:c"] == 4


def test_a_released_listener_rests_before_it_is_given_to_another() -> None:
    """Rows of the old generation and sockets live on for a while."""
    one = step(EMPTY, ["a", "b"])
    two = step(one, ["b"], now=10.0)
    assert step(two, ["b", "c"], now=11.0).listeners[TCP, "c", 22] == 10003
    assert step(two, ["b", "c"], now=10.0 + REST_S).listeners[TCP, "c", 22] == 10001


def test_who_comes_back_while_its_number_rests_gets_it_back() -> None:
    """A rule removed and added again."""
    one = step(EMPTY, ["a", "b"])
    two = step(one, ["b"], now=10.0)
    assert step(two, ["b", "a"], now=11.0).listeners[TCP, "a", 22] == 10001


def test_identities_go_round_and_a_released_one_is_not_reused_before_the_wrap() -> None:
    """From 256 to 2^32 - 1."""
    allocator = Allocator(Allocations(identities={"a": IDENTITY_FIRST}, next_identity=IDENTITY_LAST))
    assert [allocator.identity(name) for name in ("b", "c", "a")] == [IDENTITY_LAST, IDENTITY_FIRST + 1, IDENTITY_FIRST]
    after = allocator.finish()
    assert after.next_identity == IDENTITY_FIRST + 2
    released = Allocator(Allocator(after).finish())
    assert released.identity("d") == IDENTITY_FIRST + 2


def test_rule_indices_are_the_lowest_free_and_stay() -> None:
    """Holes are empty ids."""
    allocator = Allocator(EMPTY)
    assert [allocator.rule(one) for one in ("r-a", "r-b", "r-c", "r-a")] == [0, 1, 2, 0]
    again = Allocator(allocator.finish(), now=5.0)
    assert (again.rule("r-c"), again.rule("r-d")) == (2, 3)
    assert again.rule_ids() == ("", "", "r-c", "r-d")
    assert Allocator(again.finish(), now=5.0 + REST_S).rule("r-e") == 0


def test_exhausted_bands_say_which_bound() -> None:
    """Policies and listeners."""
    allocator = Allocator(EMPTY, max_policies=2)
    allocator.policy("project:a")
    with pytest.raises(ExhaustedError) as caught:
        allocator.policy("project:b")
    assert caught.value.limit == "policies"
    allocator = Allocator(EMPTY)
    for port in range(1, sum(map(len, BANDS[TCP])) - len(NEVER) + 1):
        allocator.listener(TCP, "x", port)
    with pytest.raises(ExhaustedError) as caught:
        allocator.listener(TCP, "y", 1)
    assert caught.value.limit == "listeners"


def test_a_kept_number_that_another_program_took_is_given_up() -> None:
    """After a restart a listener and a policy whose ports are somebody else's get others; the rest keep theirs."""
    first = Allocator(EMPTY)
    (
        first.policy("agent:p/a"),
        first.policy("agent:p/b"),
        first.listener(TCP, "x.com", 22),
        first.listener(TCP, "y.com", 22),
    )
    again = Allocator(first.finish(), busy=frozenset({(TCP, 10001), (TCP, 12000)}))

    assert again.listener(TCP, "x.com", 22) == 10003
    assert again.listener(TCP, "y.com", 22) == 10002
    assert again.policy("agent:p/a") == 4
    assert again.policy("agent:p/b") == 3


def test_a_policy_whose_egress_port_is_busy_is_passed_over() -> None:
    """Its number cannot be served."""
    allocator = Allocator(EMPTY, busy=frozenset({(TCP, 12000)}))
    assert allocator.policy("project:a") == 3


NAMES = st.sets(st.sampled_from("abcdefgh"), max_size=8)


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=8))
def test_numbers_are_unique_and_kept_over_any_history(history: list[set[str]]) -> None:
    """Whatever comes and goes."""
    snapshot = EMPTY
    for now, wanted in enumerate(history):
        after = step(snapshot, sorted(wanted), [f"project:{name}" for name in sorted(wanted)], float(now))
        for table in ("listeners", "policies"):
            old, new = getattr(snapshot, table), getattr(after, table)
            assert all(new[key] == old[key] for key in new if key in old)
            assert len(set(new.values())) == len(new)
            assert not {new[key] for key in new if key not in old} & set(old.values())
        snapshot = after
