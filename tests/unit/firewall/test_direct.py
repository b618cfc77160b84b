"""
What a plan passes without the proxy.
"""

from __future__ import annotations

import time

import pytest

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
