"""
What the benchmarks share: modules beside them can be imported, one fixed seed, and no log between the tables.
"""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path

import pytest
import structlog

sys.path.insert(0, str(Path(__file__).parent))
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every run asks the same."""
    random.seed(20_240_901)
