"""
What the benchmarks share: modules beside them can be imported, and one fixed seed.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every run asks the same."""
    random.seed(20_240_901)
