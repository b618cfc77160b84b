"""
Which ports of the proxy's bands other programs have.
"""

from __future__ import annotations

import socket
from pathlib import Path

from clawker_cp.firewall.plan import TCP, UDP
from clawker_cp.wiring.reserved import busy_ports


def test_listeners_at_every_address_are_busy_and_others_are_not() -> None:
    """A TCP listener and a bound datagram socket at 0.0.0.0 count; one at a single address, and a client, do not."""
    with (
        socket.socket() as everywhere,
        socket.socket() as at_one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_INET6) as six,
    ):
        everywhere.bind(("0.0.0.0", 21731))
        everywhere.listen()
        at_one.bind(("127.0.0.1", 21732))
        at_one.listen()
        datagrams.bind(("0.0.0.0", 31733))
        six.bind(("::", 21734))
        six.listen()

        assert busy_ports() & {(TCP, p) for p in (21731, 21732, 21734)} == {(TCP, 21731), (TCP, 21734)}
        assert (UDP, 31733) in busy_ports()
        assert (UDP, 21731) not in busy_ports()
    assert (TCP, 21731) not in busy_ports()


def test_a_host_without_a_table_has_nothing_busy(tmp_path: Path) -> None:
    """Without IPv6 there is no tcp6."""
    assert busy_ports(tmp_path) == frozenset()
