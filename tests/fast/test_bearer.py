"""Both twins of the header's reader: one header, one form, one answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp._fast import bearer as fast
from clawker_cp._pure import bearer as pure

VALUES = st.sampled_from(["Bearer a.b", "bearer a", "Bearer ", "", b"Bearer x"]) | st.text(max_size=9) | st.none()
HEADERS = st.tuples(st.sampled_from(["authorization", "Authorization", "x", b"authorization"]), VALUES)
TWINS = pytest.mark.parametrize("twin", [pure, fast], ids=["pure", "fast"])


@TWINS
def test_the_longest_header_still_counts(twin: Any) -> None:
    """8 KiB of token are in, one byte more is none, and so are two headers."""
    longest = ("authorization", "Bearer " + "x" * twin.MAX_TOKEN_BYTES)
    assert len(twin.presented_token([("user-agent", "x"), longest])) == 8192
    assert twin.presented_token([("authorization", longest[1] + "x")]) == ""
    assert twin.presented_token((longest, longest)) == ""


@given(st.lists(HEADERS, max_size=4))
def test_the_twins_say_the_same(metadata: list[tuple[Any, Any]]) -> None:
    """Whatever headers a call has, both find the same token or none."""
    assert fast.presented_token(metadata) == pure.presented_token(metadata)


@TWINS
@pytest.mark.parametrize("metadata", [None, 1, [1], [("authorization",)], [("a", "b", "c")]])
def test_what_is_no_metadata_is_an_error(twin: Any, metadata: Any) -> None:
    """The caller denies on it (I10); no answer is made up."""
    with pytest.raises((TypeError, ValueError)):
        twin.presented_token(metadata)
