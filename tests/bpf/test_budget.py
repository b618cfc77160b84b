"""The verifier's view of the programs: they load, and none has grown by more than a tenth unseen."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest

from clawker_cp.testing.bpf_abi import OBJECTS, root


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/bpf_budget.py, which is a script and not a package."""
    spec = importlib.util.spec_from_file_location("bpf_budget", root() / "tools/bpf_budget.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.root
def test_programs_are_within_budget(tool: ModuleType) -> None:
    """Every program loads, is in bpf/budget.json, and costs the verifier at most a tenth more than there."""
    costs = tool.measure(OBJECTS / "clawker.bpf.o")

    assert tool.problems(costs, json.loads((root() / "bpf/budget.json").read_text())) == []


def test_growth_is_seen(tool: ModuleType) -> None:
    """A tenth is allowed; more, a missing entry and a stale entry are each named."""
    budget = {"a": {"instructions": 100, "stack": 100}, "gone": {"instructions": 1, "stack": 1}}
    costs = {"a": {"instructions": 110, "stack": 111}, "new": {"instructions": 1, "stack": 1}}

    assert tool.problems(costs, budget) == [
        "new: not in bpf/budget.json",
        "gone: in bpf/budget.json, but there is no such program",
        "a: stack 111, the budget is 100",
    ]
