"""Names of agents and projects."""

from __future__ import annotations

import re

import pytest

from clawker_cp.runtime.agent_names import NAME, is_name


@pytest.mark.parametrize("text", ["a", "A.b-c_9", "0", "x" * 255])
def test_names(text: str) -> None:
    """Letters, digits, dots, dashes and underscores, the first a letter or digit."""
    assert is_name(text) and re.fullmatch(NAME, text)


@pytest.mark.parametrize("text", ["", ".a", "-a", "a\n", "\na", "a b", "a/b", "../a", "é", "a\0", "x" * 256])
def test_what_is_no_name(text: str) -> None:
    """Neither what ends with a line break, leads elsewhere or hides something, nor what is longer than a file name."""
    assert not is_name(text)
