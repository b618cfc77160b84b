"""The compiled decoder of kernel records answers exactly what its plain twin does."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp._fast import events as fast
from clawker_cp._pure import events as pure
from clawker_cp.accel import KernelEvent

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
@given(st.lists(st.binary(min_size=SIZE, max_size=SIZE), min_size=1, max_size=3), st.integers(1, 50))
def test_rows_of_a_given_type_decode_alike(records: list[bytes], times: int) -> None:
    """Series of equal records become named tuples of the same values in both, and outlive the buffer."""
    buffer = b"".join(record * times for record in records)
    decoded = fast.decode_events(buffer, KernelEvent)
    expected = pure.decode_events(buffer, KernelEvent)
    del buffer
    gc.collect()

    assert decoded == expected
    assert {type(row) for row in decoded + expected} == {KernelEvent}
    last = decoded[-1]
    assert isinstance(last, KernelEvent) and last.sequence == int.from_bytes(records[-1][16:24], "little")


def test_rows_that_could_hold_more_are_refused() -> None:
    """A type with attributes of its own could be part of a cycle that the collector would not see."""

    class Loose(tuple[object, ...]):
        pass

    kinds: tuple[Any, ...] = (Loose, list)
    for kind in kinds:
        with pytest.raises(TypeError):
            fast.decode_events(b"", kind)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=3 * SIZE).filter(lambda b: len(b) % SIZE))
def test_a_partial_record_is_an_error_of_both(buffer: bytes) -> None:
    """Neither reads beyond the last whole record."""
    for decode in (fast.decode_events, pure.decode_events):
        with pytest.raises(ValueError):
            decode(buffer)
