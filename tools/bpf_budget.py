"""
What each program costs the verifier, against bpf/budget.json.

    python tools/bpf_budget.py            compare; exit 1 when a number grew by more than ten percent
    python tools/bpf_budget.py --update   write the present numbers, for a reviewer to see

Needs root and a built object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from clawker_cp.ebpf.verifier import measure, problems

ROOT = Path(__file__).resolve().parents[1]
OBJECT = ROOT / "src/clawker_cp/_bpf/clawker.bpf.o"
BUDGET = ROOT / "bpf/budget.json"


def main(arguments: list[str]) -> int:
    costs = measure(OBJECT)
    if "--update" in arguments:
        BUDGET.write_text(json.dumps(costs, indent=2) + "\n")
    budget = json.loads(BUDGET.read_text())
    print(f"{'program':24}{'instructions':>14}{'budget':>10}{'stack':>8}{'budget':>8}")
    for name, cost in costs.items():
        allowed = budget.get(name, {})
        print(
            f"{name:24}{cost['instructions']:>14}{allowed.get('instructions', '-'):>10}"
            f"{cost['stack']:>8}{allowed.get('stack', '-'):>8}"
        )
    found = problems(costs, budget)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
