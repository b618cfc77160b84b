"""
The sockets of a sandbox, and destroying them (SOCK_DESTROY), through netlink in its namespace.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pyroute2 import netns as netns_module
from pyroute2.netlink.diag import DiagSocket

SOCK_DESTROY = 21
NLM_F_REQUEST_ACK = 0x5
ALL_STATES = 0xFFF
LISTEN_STATE = 10


@dataclass(frozen=True, slots=True)
class SocketInfo:
    """One IPv4 socket with a peer; addresses are text."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int
    cookie: tuple[int, int]


def cut_sockets(namespace: str, match: Callable[[SocketInfo], bool]) -> int:
    """
    Destroy every connected TCP and UDP socket of a namespace that matches; returns how many.

    Blocks for the dump; the namespace is entered in this thread and left again.
    """
    netns_module.pushns(namespace)
    try:
        with DiagSocket() as diag:
            found = [info for info in _sockets(diag) if match(info)]
            raw = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG
            with raw:
                raw.bind((0, 0))
                for info in found:
                    raw.send(_destroy(info))
    finally:
        netns_module.popns()
    return len(found)


def _sockets(diag: DiagSocket) -> list[SocketInfo]:
    found = []
    for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        for message in diag.get_sock_stats(family=socket.AF_INET, states=ALL_STATES, protocol=protocol):
            if message["state"] == LISTEN_STATE or not message["idiag_dport"]:
                continue
            found.append(
                SocketInfo(
                    protocol,
                    message["idiag_src"],
                    message["idiag_sport"],
                    message["idiag_dst"],
                    message["idiag_dport"],
                    tuple(message["idiag_cookie"]) if "idiag_cookie" in message.keys() else (0xFFFFFFFF, 0xFFFFFFFF),
                )
            )
    return found


def _destroy(info: SocketInfo) -> bytes:
    # struct inet_diag_req_v2 with struct inet_diag_sockid; a cookie of ones means any.
    sockid = struct.pack(">HH", info.source_port, info.destination_port)
    sockid += socket.inet_aton(info.source) + bytes(12) + socket.inet_aton(info.destination) + bytes(12)
    sockid += struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    body = struct.pack("=BBBBI", socket.AF_INET, info.protocol, 0, 0, ALL_STATES) + sockid
    return struct.pack("=IHHII", 16 + len(body), SOCK_DESTROY, NLM_F_REQUEST_ACK, 1, 0) + body
