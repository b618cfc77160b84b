"""
A sniffer that notes every packet which enters the test world, whatever its protocol.

It sees what no listener would: a lone SYN to a closed port, an ICMP echo, a crafted datagram.
Pure acknowledgements are left out by a filter in the kernel, so that a large download costs
nothing. Owned by `world_server`.
"""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import socket
import struct
from typing import Any

_ETH_P_ALL = 0x0003
_ETH_P_IP = 0x0800
_ETH_P_IPV6 = 0x86DD
_OUTGOING = 4
_SO_ATTACH_FILTER = 26
_SNAP_BYTES = 256
_PACKETS_PER_WAKE_UP = 512
MAX_FLOWS = 65536
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
# Neighbour discovery, router solicitation and multicast reports are how a link lives, not traffic.
_LINK_CHATTER = range(130, 138)
_MLD2 = 143

# (code, jump if true, jump if false, constant), over IPv4 without link header; what is not a pure
# IPv4 TCP acknowledgement is kept whole.
_KEEP, _DROP = (0x06, 0, 0, _SNAP_BYTES), (0x06, 0, 0, 0)
_FILTER = (
    (0x30, 0, 0, 0),  # A = version and header length
    (0x54, 0, 0, 0xF0),  # A &= 0xf0
    (0x15, 0, 14, 0x40),  # IPv4? else keep
    (0x30, 0, 0, 9),  # A = protocol
    (0x15, 0, 12, 6),  # TCP? else keep
    (0xB1, 0, 0, 0),  # X = header length
    (0x50, 0, 0, 13),  # A = flags
    (0x15, 0, 9, 0x10),  # exactly ACK? else keep
    (0x50, 0, 0, 12),  # A = data offset
    (0x74, 0, 0, 4),  # A >>= 4
    (0x64, 0, 0, 2),  # A <<= 2
    (0x0C, 0, 0, 0),  # A += X: all headers
    (0x07, 0, 0, 0),  # X = A
    (0x28, 0, 0, 2),  # A = total length
    (0x1C, 0, 0, 0),  # A -= X: payload
    (0x15, 0, 1, 0),  # nothing? drop
    _DROP,
    _KEEP,
)


class Sniffer:
    """
    Count the packets that came in, by flow. The table is bounded: beyond `MAX_FLOWS` only `missed` grows.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._flows: dict[tuple[str, str, int, str, int], list[int]] = {}
        self.missed = 0

    def start(self) -> None:
        """Listen on every interface of this network namespace, present and coming."""
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        code = b"".join(struct.pack("=HBBI", *line) for line in _FILTER)
        kept = ctypes.create_string_buffer(code)
        sniffer.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(_FILTER), ctypes.addressof(kept))
        )
        sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        sniffer.setblocking(False)
        asyncio.get_running_loop().add_reader(sniffer, self._read)
        self._socket = sniffer

    def close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def clear(self) -> None:
        self._read(limit=1 << 30)  # what came before is not to be found afterwards
        self._flows.clear()
        self.missed = 0

    def flows(self) -> list[dict[str, Any]]:
        """Everything that came in since the last `clear`, what waits in the socket included."""
        self._read(limit=1 << 30)
        return [
            {"proto": proto, "src": src, "sport": sport, "dst": dst, "dport": dport, "packets": packets, "bytes": size}
            for (proto, src, sport, dst, dport), (packets, size) in self._flows.items()
        ]

    def _read(self, limit: int = _PACKETS_PER_WAKE_UP) -> None:
        if self._socket is None:
            return
        for _ in range(limit):
            try:
                packet, (interface, ethertype, kind, *_rest) = self._socket.recvfrom(_SNAP_BYTES)
            except BlockingIOError:
                return
            if kind == _OUTGOING or interface == "lo":
                continue
            key = _flow(ethertype, packet)
            if key is None:
                continue
            if key not in self._flows and len(self._flows) >= MAX_FLOWS:
                self.missed += 1
                continue
            entry = self._flows.setdefault(key, [0, 0])
            entry[0] += 1
            entry[1] += len(packet)


def _flow(ethertype: int, packet: bytes) -> tuple[str, str, int, str, int] | None:
    if ethertype == _ETH_P_IP and len(packet) >= 20:
        header = (packet[0] & 0x0F) * 4
        number, source, target = packet[9], packet[12:16], packet[16:20]
    elif ethertype == _ETH_P_IPV6 and len(packet) >= 40:
        header = 40
        number, source, target = packet[6], packet[8:24], packet[24:40]
        if number == 0 and len(packet) > 48:
            number, header = packet[40], 48
        if number == 58 and len(packet) > header and (packet[header] in _LINK_CHATTER or packet[header] == _MLD2):
            return None
    else:
        return None
    sport = dport = 0
    if number in {6, 17, 132} and len(packet) >= header + 4:
        sport, dport = struct.unpack_from("!HH", packet, header)
    name = PROTOCOLS.get(number, f"ip-{number}")
    return name, str(ipaddress.ip_address(source)), sport, str(ipaddress.ip_address(target)), dport
