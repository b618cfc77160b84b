"""
Error categories.
"""

from __future__ import annotations

import errno
import inspect
import os
from typing import Any

import pytest

from clawker_cp import errors
from clawker_cp.errors import CapacityExceeded, ClawkerError, DeadlineExceeded, InvalidInput, Unsupported, unexpected

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


@pytest.mark.parametrize(
    ("number", "category", "said", "hint"),
    [
        (errno.ENOSPC, "UNAVAILABLE", "/f: No space left on device", "disk full"),
        (errno.EISDIR, "UNAVAILABLE", "/f: Is a directory", None),
        (errno.EMFILE, "CAPACITY", "no file descriptor left", "LimitNOFILE"),
    ],
)
def test_what_nobody_expected_is_told_with_its_own_next_step(
    number: int, category: str, said: str, hint: str | None
) -> None:
    """A full disk, a wrong kind of file and a limit on open files are not mistaken for each other."""
    told = unexpected(OSError(number, os.strerror(number), "/f"))

    assert (told.code, told.hint is None) == (category, hint is None)
    assert said in str(told) and (hint or "") in (told.hint or "")
