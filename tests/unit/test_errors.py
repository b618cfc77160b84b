"""
Error categories.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from clawker_cp import errors
from clawker_cp.errors import CapacityExceeded, ClawkerError, DeadlineExceeded, InvalidInput, Unsupported

CLASSES = [c for _name, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, ClawkerError)]
NEEDED: dict[Any, dict[str, Any]] = {
    CapacityExceeded: {"limit": "names"},
    Unsupported: {"feature": "bpf"},
}


@pytest.mark.parametrize("category", CLASSES)
def test_message_hint_code(category: type[ClawkerError]) -> None:
    """Every category carries a sentence, a hint and a code for programs."""
    error = category("port: 0 is not a port", hint="1 to 65535", **NEEDED.get(category, {}))

    assert (str(error), error.hint) == ("port: 0 is not a port", "1 to 65535")
    assert error.code == category.code
    assert error.code == error.code.upper()


def test_codes_differ() -> None:
    """No two categories share a code, so a program can tell them apart."""
    assert len({category.code for category in CLASSES}) == len(CLASSES)


def test_also_standard_errors() -> None:
    """Callers that know only the standard library catch what they expect."""
    assert issubclass(InvalidInput, ValueError)
    assert issubclass(DeadlineExceeded, TimeoutError)
