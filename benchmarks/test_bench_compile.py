"""
What turning rules into a plan costs, and what keeping them on disk costs.

Groups: a compile after one rule changed (the usual case: unchanged rules are remembered), a
compile from nothing, the gate's decision for one name, and one rule added to a file of 1,000,
against rewriting that file through the round-trip YAML library it would otherwise go through.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from clawker_cp.firewall import effective, outcomes
from clawker_cp.firewall.allocations import EMPTY, Allocations
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.names import NameTables
from clawker_cp.firewall.plan import Topology
from clawker_cp.firewall.rules import Rule
from clawker_cp.firewall.shorthand import parse_rule_shorthand
from clawker_cp.firewall.store import RuleStore


def some_rules(number: int) -> list[Rule]:
    """Return rules as people have them: mostly https names, some wildcards, paths, ssh, networks."""

    def one(index: int) -> str:
        name = f"h{index}.d{index % 97}.example"
        kinds = {5: f"https://*.w{name}", 6: f"https://{name}/v1", 7: f"ssh://{name}", 8: f"tcp://{name}:5432"}
        return kinds.get(
            index % 10, f"tcp://10.{index // 250 % 250}.{index % 250}.0/24:443" if index % 10 == 9 else name
        )

    return [parse_rule_shorthand(one(index)) for index in range(number)]


def compiled(rules: list[Rule], allocations: Allocations = EMPTY) -> Compiled:
    """Compile; the rules here have no problems."""
    found = compile_plan(rules, ["agent:p/a"], Topology(), allocations, now=0.0)
    assert isinstance(found, Compiled)
    return found


@pytest.mark.parametrize("number", [10, 1_000, 10_000])
@pytest.mark.benchmark(group="compile after one rule changed")
def test_compile_after_a_change(benchmark: Any, number: int) -> None:
    """One rule more than last time, numbers kept."""
    rules = some_rules(number)
    before = compiled(rules)
    extra: Iterator[Rule] = (parse_rule_shorthand(f"x{index}.example") for index in count())
    benchmark.pedantic(
        lambda rule: compiled([*rules, rule], before.allocations),
        setup=lambda: ((next(extra),), {}),
        rounds=5 if number > 1_000 else 20,
    )


@pytest.mark.parametrize("remembering", [True, False])
@pytest.mark.benchmark(group="one agent's rule among 50 agents and 200 global rules")
def test_compile_for_one_agent_of_many(benchmark: Any, remembering: bool) -> None:
    """With and without taking the other policies over from the last compile."""
    rules = some_rules(200)
    rules += [parse_rule_shorthand("own.example", scope=f"agent:p/a{index}") for index in range(50)]
    before = compiled(rules)
    extra = (parse_rule_shorthand(f"x{index}.example", scope="agent:p/a7") for index in count())
    benchmark.pedantic(
        lambda rule: compile_plan(
            [*rules, rule], (), Topology(), before.allocations, now=0.0, previous=before if remembering else None
        ),
        setup=lambda: ((next(extra),), {}),
        rounds=10,
    )


@pytest.mark.parametrize("number", [10, 1_000])
@pytest.mark.benchmark(group="compile from nothing")
def test_compile_from_nothing(benchmark: Any, number: int) -> None:
    """As at start: no rule was read before."""
    rules = some_rules(number)

    def forget() -> None:
        for cache in (effective._facts, outcomes._alone):
            cache.cache_clear()

    benchmark.pedantic(lambda: compiled(rules), setup=forget, rounds=10)


@pytest.mark.parametrize("name", ["h0.d0.example", "a.b.wh5.d5.example", "nothing.example"])
@pytest.mark.benchmark(group="gate decision among 1,000 rules")
def test_decide(benchmark: Any, name: str) -> None:
    """Exact, deep below a wildcard, unknown."""
    tables = NameTables(compiled(some_rules(1_000)).plan)
    benchmark(tables.decide, 1, name)


@pytest.mark.benchmark(group="add one rule to a file of 1,000")
def test_store_adds_one_rule(benchmark: Any, tmp_path: Path) -> None:
    """Ours: only the new item is written, the file is replaced and synced."""
    rules = some_rules(1_000)
    store = RuleStore(tmp_path)
    store.write(rules)
    extra = (parse_rule_shorthand(f"x{index}.example") for index in count())
    benchmark.pedantic(lambda rule: store.write([*rules, rule]), setup=lambda: ((next(extra),), {}), rounds=10)


@pytest.mark.benchmark(group="add one rule to a file of 1,000")
def test_round_trip_library_adds_one_rule(benchmark: Any, tmp_path: Path) -> None:
    """Peer: the library dumps the document it holds in memory, without any file."""
    store = RuleStore(tmp_path)
    store.write(some_rules(1_000))
    yaml = YAML(typ="rt")
    document = yaml.load((tmp_path / "egress-rules.yaml").read_text())
    document["rules"].append({"dst": "x.example", "proto": "https", "port": "443", "action": "allow"})
    benchmark.pedantic(lambda: yaml.dump(document, io.StringIO()), rounds=3)
