"""Entries by id, however they changed, and never more than fit."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.runtime.tables import Table


class Row(NamedTuple):
    color: str | None
    size: int = 0


def table(capacity: int = 8) -> Table[Row]:
    return Table(capacity)


def test_found_by_id() -> None:
    """What is not there is None; the others of a set are those that are left of it."""
    rows = table()
    for key, color in (("a", "red"), ("b", "red"), ("c", None)):
        assert rows.put(key, Row(color))
    assert (rows.get("a"), rows.get("c"), rows.get("d")) == (Row("red"), Row(None), None)
    assert (len(rows), rows.keys_but({"a", "d"})) == (3, ["b", "c"])


def test_it_is_bounded() -> None:
    """What does not fit is refused and counted; what is known can still change."""
    rows = table(2)
    assert [rows.put(key, Row("red")) for key in "aabc"] == [True, False, True, False]
    assert (len(rows), rows.refused) == (2, 1)
    assert rows.put("a", Row("blue"))
    assert rows.remove("b")
    assert not rows.remove("b")
    assert rows.put("c", Row("red"))


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.none() | st.builds(Row, st.none() | st.sampled_from(["red", "blue"])))
    )
)
def test_it_is_a_bounded_mapping(steps: list[tuple[str, Row | None]]) -> None:
    """After any puts and removals it holds what a mapping of so many entries would, and each said what it changed."""
    rows = table(3)
    model: dict[str, Row] = {}
    for key, row in steps:
        if row is None:
            assert rows.remove(key) == (model.pop(key, None) is not None)
            continue
        fits = key in model or len(model) < 3
        assert rows.put(key, row) == (fits and model.get(key) != row)
        if fits:
            model[key] = row

    assert rows.copy() == model
