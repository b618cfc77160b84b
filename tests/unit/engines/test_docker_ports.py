"""Reading what the kernel tells of interfaces."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.engines.docker.ports import attributes, touches


def message(kind: int, *values: tuple[int, bytes]) -> bytes:
    body = struct.pack("=BxHiII", 0, 1, 9, 0, 0)
    for name, value in values:
        body += struct.pack("=HH", 4 + len(value), name) + value + bytes(-len(value) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_ports_of_this_bridge_only() -> None:
    """A port that appears or goes is one of the bridge by its master; other interfaces are not."""
    here, there, name = struct.pack("=I", 7), struct.pack("=I", 8), (3, b"veth1\0")
    assert touches(message(16, name, (10, here)), 7)
    assert touches(message(17, name, (10, here)), 7)
    assert not touches(message(16, name, (10, there)), 7)
    assert not touches(message(16, name), 7)
    assert not touches(message(20, (10, here)), 7)
    assert touches(message(16, name) + message(16, name, (10, here)), 7)


def test_message_that_cannot_be_read_counts_as_a_change() -> None:
    """A length that leads nowhere is not taken for silence."""
    assert touches(struct.pack("=IHHII", 3, 16, 0, 0, 0), 7)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_to_an_end(data: bytes) -> None:
    """Damaged messages neither fail nor go on for ever."""
    assert touches(data, 7) in {True, False}
    assert all(len(value) <= len(data) for _name, value in attributes(data))
