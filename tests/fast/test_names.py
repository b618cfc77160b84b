"""
Both twins of the name matcher against the same cases, and against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp import accel
from clawker_cp._fast import names as fast
from clawker_cp._pure import names as pure

LABEL = st.text("abAB-", min_size=1, max_size=2)
NAME = st.lists(LABEL, min_size=1, max_size=5).map(".".join)
TABLE = st.dictionaries(NAME, st.integers(0, 2**40), max_size=12)


@pytest.fixture(params=[pure.NameMatcher, fast.NameMatcher], ids=["pure", "fast"])
def matcher(request: pytest.FixtureRequest) -> Any:
    return request.param


EXACT = {"api.example.com": 1, "example.org": 2, "Mixed.Example.NET.": 3}
WILDCARD = {"example.com": 10, "deep.example.com": 11, "github.io": 12, "a.b.c.d": 13, "net": 14}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api.example.com", 1),
        ("API.Example.COM", 1),
        ("api.example.com.", 1),
        (b"api.example.com", 1),
        ("api.example.com..", -1),
        ("x.api.example.com", 10),
        ("example.com", 10),
        ("deep.example.com", 11),
        ("x.y.deep.example.com", 11),
        ("xdeep.example.com", 10),
        ("badexample.com", -1),
        ("example.org", 2),
        ("www.example.org", -1),
        ("mixed.example.net", 3),
        ("x.mixed.example.net", 14),
        ("b.c.d", -1),
        ("z.a.b.c.d", 13),
        ("", -1),
        (".", -1),
        ("com", -1),
        ("ex\u00e4mple.com", -1),
        (b"\xff.example.com", 10),
        ("a" * 254, -1),
        ("a." * 126 + "a", -1),
        ("a." * 121 + "example.com", 10),
        ("aa." * 122 + "example.com", -1),
    ],
)
def test_longest_match(matcher: Any, name: str | bytes, value: int) -> None:
    """The exact entry wins, then the longest base that equals or is a parent of the name."""
    assert matcher(EXACT, WILDCARD).match(name) == value


def test_empty_base_is_every_name(matcher: Any) -> None:
    """The base "" answers for every name that nothing longer answers for, and only for names."""
    table = matcher({}, {"": 7, "example.com": 8})
    assert (table.match("x.y"), table.match("a.example.com"), table.match("")) == (7, 8, -1)
    assert len(table) == 1


@pytest.mark.parametrize(("exact", "problem"), [({"a": -1}, "negative"), ({"a" * 254: 1}, "longer")])
def test_entries_that_cannot_be_kept_are_refused(matcher: Any, exact: Mapping[str, int], problem: str) -> None:
    """A value that means "no match" and a name that no question can have raise ValueError."""
    with pytest.raises(ValueError, match=problem):
        matcher(exact, {})


def test_other_types_are_refused(matcher: Any) -> None:
    """A name is text or bytes."""
    with pytest.raises(TypeError, match="int"):
        matcher({}, {}).match(1)


def test_many_names(matcher: Any) -> None:
    """Ten thousand names are found, their neighbours are not."""
    exact = {f"host-{number}.example.com": number for number in range(10_000)}
    table = matcher(exact, {})
    assert len(table) == 10_000
    assert all(table.match(name) == number for name, number in exact.items())
    assert all(table.match(f"x{name}") == -1 for name in exact)


@given(exact=TABLE, wildcard=TABLE, name=NAME | st.text(max_size=12) | st.binary(max_size=12))
def test_twins_agree(exact: dict[str, int], wildcard: dict[str, int], name: str | bytes) -> None:
    """Whatever the tables and the name, both implementations say the same."""
    assert fast.NameMatcher(exact, wildcard).match(name) == pure.NameMatcher(exact, wildcard).match(name)


def test_compiled_is_the_default() -> None:
    """Nobody runs the plain twin without having asked for it."""
    assert accel.IMPLEMENTATION == "fast"
    compiled: object = fast.NameMatcher
    assert accel.NameMatcher is compiled
