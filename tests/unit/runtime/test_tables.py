"""Entries found by id and by what they say, however they changed."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.runtime.tables import Table


class Row(NamedTuple):
    color: str | None
    size: int = 0


def table(capacity: int = 8) -> Table[Row]:
    return Table(capacity, color=lambda row: row.color)


def test_found_by_what_they_say() -> None:
    """All in the order they came, or the only one; None is not found by."""
    rows = table()
    for key, color in (("a", "red"), ("b", "red"), ("c", "blue"), ("d", None)):
        assert rows.put(key, Row(color))
    assert rows.find("color", "red") == [Row("red"), Row("red")]
    assert (rows.only("color", "red"), rows.only("color", "blue")) == (None, Row("blue"))
    assert (rows.find("color", None), rows.only("color", "green"), rows.get("e")) == ([], None, None)
    assert (len(rows), list(rows)[3], rows.keys_but({"a", "b", "c"})) == (4, Row(None), ["d"])


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
def test_indexes_agree_with_the_entries(steps: list[tuple[str, Row | None]]) -> None:
    """After any puts and removals every look-up answers as a search of all entries would, and nothing is kept."""
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
    for color in ("red", "blue"):
        expected = [row for row in model.values() if row.color == color]
        assert sorted(rows.find("color", color)) == sorted(expected)
        assert rows.only("color", color) == (expected[0] if len(expected) == 1 else None)
    assert set(rows._found["color"]) == {row.color for row in model.values() if row.color}
