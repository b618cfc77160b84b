"""Both twins of scope matching against the same cases, and against each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp._fast import scopes as fast
from clawker_cp._pure import scopes as pure


@pytest.mark.parametrize("has_scope", [pure.has_scope, fast.has_scope], ids=["pure", "fast"])
@pytest.mark.parametrize(
    ("text", "required", "held"),
    [
        ("admin", "admin", True),
        ("read admin write", "admin", True),
        ("read admin", "admin", True),
        ("admin ", "admin", True),
        ("Admin", "admin", False),
        ("administrator", "admin", False),
        ("xadmin", "admin", False),
        ("agent:self:register", "agent:self", False),
        ("admin\tread", "admin", False),
        ("admin,read", "admin", False),
        ("", "admin", False),
        ("", "", False),
        (" ", "", False),
        ("adm\u0131n admin", "admin", True),
        ("adm\u0131n", "adm\u0131n", True),
        ("a" * 5000 + " admin", "admin", True),
    ],
)
def test_a_scope_is_a_whole_word(has_scope: Callable[[str, str], bool], text: str, required: str, held: bool) -> None:
    """Exact words between single spaces count, parts and other cases do not, and an empty scope is none."""
    assert has_scope(text, required) is held


@given(st.text("ab :\u00e9", max_size=12), st.text("ab:\u00e9", max_size=4))
def test_the_twins_agree(text: str, required: str) -> None:
    """Whatever is asked, both say the same, and the words are those that match."""
    assert fast.has_scope(text, required) == pure.has_scope(text, required) == (required in pure.scope_words(text))
    assert fast.scope_words(text) == pure.scope_words(text)


@pytest.mark.parametrize("has_scope", [pure.has_scope, fast.has_scope], ids=["pure", "fast"])
def test_what_is_no_text_is_an_error(has_scope: Callable[..., bool]) -> None:
    """None is never "no scope needed"."""
    with pytest.raises((TypeError, AttributeError)):
        has_scope(None, "admin")
