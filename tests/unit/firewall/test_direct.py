"""
What a plan passes without the proxy.
"""

from __future__ import annotations

import ipaddress
import time
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.allocations import EMPTY
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.direct import passed, passes
from clawker_cp.firewall.plan import TCP, UDP, Plan, Topology
from clawker_cp.firewall.shorthand import parse_shorthands

KEY = "agent:p/a"


def plan_of(*allow: str, deny: tuple[str, ...] = ()) -> tuple[Plan, int]:
    compiled = compile_plan(
        parse_shorthands(allow, deny, scope=KEY), [KEY], Topology(http3=False), EMPTY, now=time.time()
    )

    assert isinstance(compiled, Compiled)
    return compiled.plan, compiled.plan.agents[KEY]


@pytest.mark.parametrize(
    ("address", "port", "l4", "expected"),
    [
        ("203.0.113.9", 5432, TCP, True),
        ("203.0.113.9", 5433, TCP, False),
        ("203.0.113.9", 5432, UDP, False),
        ("198.51.100.9", 5432, TCP, False),
        ("203.0.113.66", 5432, TCP, False),
    ],
    ids=["allowed", "another port", "another protocol", "another network", "denied inside the network"],
)
def test_the_longest_prefix_decides(address: str, port: int, l4: int, expected: bool) -> None:
    """An address passes on its prefix's ports, unless a longer prefix denies it."""
    plan, policy = plan_of("tcp://203.0.113.0/24:5432", deny=("tcp://203.0.113.66/32:5432",))

    assert passes(plan, policy, l4, address, port) is expected


def test_names_and_other_policies_pass_nothing_directly() -> None:
    """A name rule has no direct span, and a policy's spans are its own."""
    plan, policy = plan_of("https://api.example.com", "tcp://203.0.113.0/24:5432")

    assert [(str(one.network), one.l4, one.low, one.high) for one in passed(plan, policy)] == [
        ("203.0.113.0/24", TCP, 5432, 5432)
    ]
    assert list(passed(plan, 1)) == []
    assert not passes(plan, 1, TCP, "203.0.113.9", 5432)


def test_what_a_longer_prefix_says_is_left_out_of_the_shorter() -> None:
    """A network is told in pieces around what is denied in it, and around what is allowed again in that."""
    plan, policy = plan_of(
        "tcp://203.0.113.0/24:5432", "tcp://203.0.113.66/32:5432", deny=("tcp://203.0.113.64/30:5432",)
    )

    told = list(passed(plan, policy))
    reached = {str(address) for span in told for address in span.network}
    assert reached == {f"203.0.113.{n}" for n in range(256)} - {f"203.0.113.{n}" for n in (64, 65, 67)}


ADDRESSES = st.integers(0, 63).map(lambda n: f"203.0.113.{n}")
RULES = st.lists(
    st.tuples(
        st.booleans(), st.integers(26, 32), st.integers(0, 63), st.sampled_from(["tcp", "udp"]),
        st.tuples(st.integers(1, 9), st.integers(0, 4)),
    ),
    max_size=8,
)  # fmt: skip


@given(RULES, st.lists(st.tuples(ADDRESSES, st.sampled_from([TCP, UDP]), st.integers(1, 14)), min_size=8, max_size=20))
def test_ring_and_kernel_agree_on_every_address(rules: list[Any], probes: list[tuple[str, int, int]]) -> None:
    """What the ring is told to let through is what the longest prefix passes, no more and no less."""
    texts: tuple[list[str], list[str]] = [], []
    for denied, length, offset, proto, (low, more) in rules:
        network = ipaddress.ip_network(f"203.0.113.{offset}/{length}", strict=False)
        texts[denied].append(f"{proto}://{network}:{low}" + (f"-{low + more}" if more else ""))
    try:
        plan, policy = plan_of(*texts[0], deny=tuple(texts[1]))
    except ClawkerError:
        assume(False)
        raise
    spans = list(passed(plan, policy))
    for address, l4, port in probes:
        told = any(
            span.l4 == l4 and span.low <= port <= span.high and ipaddress.ip_address(address) in span.network
            for span in spans
        )
        assert told == passes(plan, policy, l4, address, port), (address, l4, port)
