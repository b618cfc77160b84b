"""Reading what the kernel tells of dropped frames."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.engines.host.nflog import parse_record


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def owner(index: int) -> str:
    return f"sandbox-{index}"


def test_record_of_a_tcp_packet() -> None:
    """Addresses, ports, reason and the sandbox of the physical interface are read."""
    packet = struct.pack(">BBHHHBBH4s4sHH", 0x45, 0, 44, 0, 0, 64, 6, 0, socket.inet_aton("10.231.80.2"),
                         socket.inet_aton("203.0.113.9"), 40000, 443)  # fmt: skip
    data = attribute(1, struct.pack(">HBx", 0x0800, 0)) + attribute(4, struct.pack(">I", 3))
    data += attribute(6, struct.pack(">I", 7)) + attribute(9, packet) + attribute(10, b"no_route\0")
    event = parse_record(data, owner, 2)
    assert (event.sandbox_id, event.reason, event.protocol, event.lost) == ("sandbox-7", "no_route", 6, 2)
    assert (event.source, event.source_port) == ("10.231.80.2", 40000)
    assert (event.destination, event.destination_port) == ("203.0.113.9", 443)


@given(st.binary(max_size=200))
def test_damaged_records_are_read_without_failing(data: bytes) -> None:
    """Whatever the bytes are, there is an event with a reason."""
    assert parse_record(data, owner, 0).reason


@given(st.sampled_from([0x0800, 0x0806, 0x86DD, 0x8100]), st.binary(max_size=60))
def test_damaged_packets_are_read_without_failing(ether_type: int, packet: bytes) -> None:
    """A frame cut anywhere gives an event with its type."""
    data = attribute(1, struct.pack(">HBx", ether_type, 0)) + attribute(9, packet)
    assert parse_record(data, owner, 0).ether_type == ether_type
