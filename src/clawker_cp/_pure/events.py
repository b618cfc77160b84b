"""
Plain twin of `_fast.events`: the same records with `struct`, for comparison and for builds without it.

The layout is that of `struct clawker_event` on a little-endian machine; a test compares it with
the compiled one.
"""

from __future__ import annotations

import struct

_RECORD = struct.Struct("<QQQQ16sIIIIIHHBBBBBBB9x")


def decode_events(buffer: bytes) -> list[tuple[object, ...]]:
    """
    Decode records back to back; a partial record at the end is an error.
    """
    if len(buffer) % _RECORD.size:
        raise ValueError("events: a partial record")
    return list(_RECORD.iter_unpack(buffer))
