"""The compiled decoder of kernel records answers exactly what its plain twin does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp._fast import events as fast
from clawker_cp._pure import events as pure

SIZE = pure._RECORD.size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=SIZE, max_size=SIZE), max_size=5))
def test_whole_records_decode_alike(records: list[bytes]) -> None:
    """Any bytes of whole records give the same tuples."""
    buffer = b"".join(records)
    decoded = fast.decode_events(buffer)
    assert decoded == pure.decode_events(buffer)
    assert len(decoded) == len(records)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=3 * SIZE).filter(lambda b: len(b) % SIZE))
def test_a_partial_record_is_an_error_of_both(buffer: bytes) -> None:
    """Neither reads beyond the last whole record."""
    for decode in (fast.decode_events, pure.decode_events):
        with pytest.raises(ValueError):
            decode(buffer)
