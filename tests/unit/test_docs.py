"""
Tables of the documentation name tests that exist, and every row of the threats has one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
ROWS = {*map(str, range(1, 37))}


@pytest.mark.parametrize("page", ["docs/threats.md", "docs/invariants.md"])
def test_every_named_test_exists(page: str) -> None:
    """A file or test that a table names is there, so that a renamed one is noticed."""
    named = NAMED.findall((ROOT / page).read_text())
    missing = [
        f"{name}::{test}"
        for name, test in named
        if not (ROOT / name).is_file() or (test and f"def {test}(" not in (ROOT / name).read_text())
    ]

    assert len(named) > 10
    assert missing == []


def test_every_threat_has_a_test() -> None:
    """Each row names a test or has a technique, and no technique is of a row that is not in the table."""
    techniques = set(re.findall(r'@attempt\("(\d+)"', (ROOT / "tests/escape/techniques.py").read_text()))
    table = dict(re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (ROOT / "docs/threats.md").read_text(), re.MULTILINE))

    assert set(table) == ROWS
    assert {row for row, tests in table.items() if "technique" in tests} == techniques
    assert [row for row, tests in table.items() if "technique" not in tests and not NAMED.search(tests)] == []
