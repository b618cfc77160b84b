"""
Plain twin of `_fast.events`: the same records with `struct`, for comparison and for builds without it.

The layout is that of `struct clawker_event` on a little-endian machine; a test compares it with
the compiled one.
"""

from __future__ import annotations

import struct
from functools import partial

_RECORD = struct.Struct("<QQQQ16sIIIIIHHBBBBBBB9x")


def decode_events(buffer: bytes, kind: type[tuple[object, ...]] = tuple) -> list[tuple[object, ...]]:
    """
    Decode records back to back; a partial record at the end is an error. `kind` is a tuple type of 19 fields.
    """
    if len(buffer) % _RECORD.size:
        raise ValueError("events: a partial record")
    rows = _RECORD.iter_unpack(buffer)
    # A named tuple's own constructors would check and convert each record again.
    return list(rows) if kind is tuple else list(map(partial(tuple.__new__, kind), rows))
