"""
Name matching: compiled, plain twin, and one `re` alternation, over 10, 1,000 and 10,000 names.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from clawker_cp._fast.names import NameMatcher as Fast
from clawker_cp._pure.names import NameMatcher as Plain


class Alternation:
    """What one would write without a matcher: a regular expression of all names."""

    def __init__(self, exact: dict[str, int], wildcard: dict[str, int]) -> None:
        parts = [f"(?:{re.escape(name)})" for name in exact]
        parts += [rf"(?:[^.]+\.)*{re.escape(name)}" for name in sorted(wildcard, key=len, reverse=True)]
        self._pattern = re.compile("|".join(parts))

    def match(self, name: str) -> int:
        """Return 0 if any name matches, else -1: it cannot even say which."""
        return 0 if self._pattern.fullmatch(name.lower()) else -1


def questions(count: int) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """Return tables of `count` names, half of them wildcards, and 300 questions, a third of which match nothing."""
    chance = random.Random(count)
    exact = {f"host-{number}.example.com": number for number in range(count // 2)}
    wildcard = {f"zone-{number}.example.net": number for number in range(count // 2)}
    asked = [f"Host-{chance.randrange(count // 2)}.Example.com" for _ in range(100)]
    asked += [f"a.b.zone-{chance.randrange(count // 2)}.example.net" for _ in range(100)]
    asked += [f"www.nothing-{chance.randrange(count)}.example.org" for _ in range(100)]
    return exact, wildcard, asked


@pytest.mark.parametrize("count", [10, 1_000, 10_000])
@pytest.mark.parametrize("kind", [Fast, Plain, Alternation], ids=["fast", "plain", "re"])
def test_bench_name_match(benchmark: Any, kind: Callable[..., Any], count: int) -> None:
    """300 questions against `count` names."""
    exact, wildcard, asked = questions(count)
    match = kind(exact, wildcard).match
    assert sum(match(name) >= 0 for name in asked) == 200
    benchmark.group = f"name_match, {count} names, 300 questions"
    if kind is Alternation:  # a scan of 10,000 alternatives takes a second a round
        benchmark.pedantic(lambda: [match(name) for name in asked], rounds=3)
    else:
        benchmark(lambda: [match(name) for name in asked])
