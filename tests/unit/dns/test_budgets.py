"""
Budgets against tunnelling.
"""

from __future__ import annotations

import structlog

from clawker_cp.dns.budgets import Budgets, registered_domain
from clawker_cp.dns.settings import BudgetSettings

S = 1_000_000_000
TXT, A = 16, 1


def spend(
    budgets: Budgets,
    name: str,
    *,
    agent: int = 1,
    now_s: float = 0,
    qtype: int = A,
    leaves: bool = True,
    zone: str = "wild.example",
) -> bool:
    return budgets.spend(agent, zone, name, qtype, int(now_s * S), key=f"agent:p/{agent}", leaves=leaves)


def test_distinct_names() -> None:
    """The names of a window are counted once each; one more than the bound closes it, the next window opens it."""
    budgets = Budgets(BudgetSettings(names=3))
    for _ in range(3):
        assert all(spend(budgets, f"n{number}.wild.example") for number in range(3))
    assert not spend(budgets, "n3.wild.example")
    assert not spend(budgets, "n0.wild.example"), "over budget everything of the domain is closed"
    assert spend(budgets, "n0.wild.example", agent=2), "another agent has a budget of its own"
    assert spend(budgets, "n0.wild.example", now_s=60)


def test_octets_of_names() -> None:
    """Octets count for every name that leaves, and not for repeats that the cache answers."""
    budgets = Budgets(BudgetSettings(names=0, name_bytes=100))
    name = "x" * 30 + ".wild.example"
    assert spend(budgets, name)
    assert all(spend(budgets, name, leaves=False) for _ in range(50))
    assert spend(budgets, name)
    assert not spend(budgets, name)


def test_txt_questions() -> None:
    """TXT and NULL count, repeats included."""
    budgets = Budgets(BudgetSettings(txt=2))
    assert spend(budgets, "a.wild.example", qtype=TXT, leaves=False)
    assert spend(budgets, "a.wild.example", qtype=10, leaves=False)
    assert not spend(budgets, "a.wild.example", qtype=TXT, leaves=False)


def test_all_off() -> None:
    """Zeroes switch the budget off, and nothing is remembered."""
    budgets = Budgets(BudgetSettings(0, 0, 0))
    assert all(spend(budgets, f"n{number}.wild.example", qtype=TXT) for number in range(1000))
    assert budgets.statistics()["windows"] == 0


def test_warned_once_then_exceeded_once() -> None:
    """Half the budget is one event, the whole another; both name agent and domain."""
    budgets = Budgets(BudgetSettings(names=4))
    with structlog.testing.capture_logs() as logs:
        for number in range(10):
            spend(budgets, f"n{number}.a.wild.example")
    assert [(entry["event"], entry["domain"], entry["agent"]) for entry in logs] == [
        ("dns_budget_warning", "wild.example", "agent:p/1"),
        ("dns_budget_exceeded", "wild.example", "agent:p/1"),
    ]


def test_wildcard_above_registered_domains() -> None:
    """Below a wildcard on a public suffix each registered domain has its own budget, and their number a bound."""
    budgets = Budgets(BudgetSettings(names=1, domains_per_agent=2))
    assert spend(budgets, "a.one.github.io", zone="github.io")
    assert spend(budgets, "a.two.github.io", zone="github.io")
    assert not spend(budgets, "b.one.github.io", zone="github.io")
    assert not spend(budgets, "a.three.github.io", zone="github.io")
    assert spend(budgets, "a.three.github.io", zone="github.io", now_s=61)


def test_counted_again() -> None:
    """A question that is judged a second time is not counted a second time, but sees the end of the budget."""
    budgets = Budgets(BudgetSettings(txt=1))
    assert spend(budgets, "a.wild.example", qtype=TXT)
    assert budgets.spend(1, "wild.example", "a.wild.example", TXT, 0, key="k", leaves=True, again=True)
    assert not spend(budgets, "a.wild.example", qtype=TXT)
    assert not budgets.spend(1, "wild.example", "a.wild.example", TXT, 0, key="k", leaves=True, again=True)


def test_forget() -> None:
    """An agent that is gone leaves nothing."""
    budgets = Budgets(BudgetSettings(names=1))
    spend(budgets, "a.wild.example")
    budgets.forget(1)
    assert budgets.statistics() == {"agents": 0, "windows": 0, "exceeded": 0}


def test_memory_of_a_window_is_bounded() -> None:
    """Names are remembered up to a bound even where their number has none."""
    budgets = Budgets(BudgetSettings(names=0, name_bytes=1 << 30))
    for number in range(6000):
        spend(budgets, f"n{number}.wild.example")
    assert max(len(window.names) for windows in budgets._agents.values() for window in windows.values()) <= 4097


def test_registered_domain() -> None:
    """The registered domain is found by the public suffix list."""
    assert registered_domain("a.b.example.co.uk") == "example.co.uk"
    assert registered_domain("github.io") == ""
