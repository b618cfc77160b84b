"""
The sockets of a sandbox, and destroying them (SOCK_DESTROY), through netlink in its namespace.

Layout: struct inet_diag_req_v2 and struct inet_diag_msg of <linux/inet_diag.h>. IPv4, and IPv6
sockets that carry IPv4, over TCP and UDP.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.errors import Unavailable

log = structlog.get_logger()

_SOCK_DIAG, _BY_FAMILY, _DESTROY = 4, 20, 21
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_ALL_STATES = 0xFFF
_LISTEN, _TIME_WAIT = 10, 6
_HEADER = struct.Struct("=IHHII")
_REQUEST_V2 = struct.Struct("=BBBBI")
_SOCKID = struct.Struct(">HH16s16s")
_RECEIVE_BYTES = 65536
_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class SocketInfo:
    """One socket with a peer; addresses are text, IPv4 also when the socket is an IPv6 one."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int
    family: int = socket.AF_INET
    raw_id: bytes = b""


def cut_sockets(namespace: Path, match: Callable[[SocketInfo], bool]) -> int:
    """
    Destroy every connected TCP and UDP socket of a namespace that matches; returns how many.

    Blocks for the dump. A socket that closed meanwhile is not counted. Raises `NotFound` when the
    namespace is gone, `Unavailable` when the kernel refuses.
    """
    return in_netns(namespace, lambda: _cut(match))


def list_sockets(namespace: Path) -> list[SocketInfo]:
    """
    Every TCP and UDP socket of a namespace that has a peer. Blocks for the dump.
    """

    def dump() -> list[SocketInfo]:
        with _open() as netlink:
            return list(_dump(netlink))

    return in_netns(namespace, dump)


def _open() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG)
    netlink.settimeout(_LIMIT_S)
    netlink.bind((0, 0))
    return netlink


def _cut(match: Callable[[SocketInfo], bool]) -> int:
    with _open() as netlink:
        return sum(_destroy(netlink, info) for info in list(_dump(netlink)) if match(info))


def _dump(netlink: socket.socket) -> Iterator[SocketInfo]:
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            body = _REQUEST_V2.pack(family, protocol, 0, 0, _ALL_STATES) + bytes(48)
            netlink.send(_HEADER.pack(16 + len(body), _BY_FAMILY, _REQUEST | _DUMP, 1, 0) + body)
            for message in _messages(netlink):
                info = _parse(message, protocol)
                if info is not None:
                    yield info


def _messages(netlink: socket.socket) -> Iterator[bytes]:
    while True:
        data = netlink.recv(_RECEIVE_BYTES)
        at = 0
        while at + 16 <= len(data):
            length, kind, _flags, _sequence, _pid = _HEADER.unpack_from(data, at)
            if kind == _DONE:
                return
            if kind == _ERROR:
                number = -struct.unpack_from("=i", data, at + 16)[0]
                if number:
                    raise Unavailable(f"the kernel does not list sockets: {os.strerror(number)}")
                return
            yield data[at + 16 : at + length]
            at += (length + 3) & ~3


def _parse(message: bytes, protocol: int) -> SocketInfo | None:
    family, state = message[0], message[1]
    raw_id = message[4:52]
    source_port, destination_port, source, destination = _SOCKID.unpack_from(raw_id)
    if state in {_LISTEN, _TIME_WAIT} or not destination_port:
        return None
    return SocketInfo(
        protocol, _text(family, source), source_port, _text(family, destination), destination_port, family, raw_id
    )


def _text(family: int, octets: bytes) -> str:
    if family == socket.AF_INET:
        return socket.inet_ntoa(octets[:4])
    address = ipaddress.IPv6Address(octets)
    return str(address.ipv4_mapped or address)


def _destroy(netlink: socket.socket, info: SocketInfo) -> int:
    # The cookie in the id makes sure it is the socket that was listed, not a later one.
    body = _REQUEST_V2.pack(info.family, info.protocol, 0, 0, _ALL_STATES) + info.raw_id
    netlink.send(_HEADER.pack(16 + len(body), _DESTROY, _REQUEST | _ACK, 2, 0) + body)
    data = netlink.recv(_RECEIVE_BYTES)
    number = -struct.unpack_from("=i", data, 16)[0]
    if number == 0:
        return 1
    if number in {2, 111}:  # ENOENT, ECONNREFUSED: closed by itself in between
        return 0
    if number == 95:  # EOPNOTSUPP
        raise Unavailable("the kernel does not destroy sockets (CONFIG_INET_DIAG_DESTROY)")
    log.warning("engines_socket_not_cut", error=os.strerror(number), port=info.source_port)
    return 0
