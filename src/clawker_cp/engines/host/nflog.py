"""
What the host ring drops, read from the kernel as records (nfnetlink_log).

One netlink socket, read when the loop says so and never waited for. The rules limit how much comes
(ruling R18); what the socket cannot hold is counted, not lost silently. Layout:
<linux/netfilter/nfnetlink_log.h>.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import structlog

from clawker_cp.engines.base import RingEvent
from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.errors import Unavailable

log = structlog.get_logger()

_NETLINK_NETFILTER = 12
_ULOG = 4  # NFNL_SUBSYS_ULOG
_PACKET, _CONFIG = _ULOG << 8, (_ULOG << 8) | 1
_REQUEST, _ACK = 0x1, 0x4
_CMD, _MODE, _THRESHOLD = 1, 2, 5
_BIND, _COPY_PACKET = 1, 2
_PACKET_HEADER, _INDEV, _PHYSINDEV, _PAYLOAD, _PREFIX = 1, 4, 6, 9, 10
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_COPY_BYTES = 96
_BUFFER_BYTES = 262_144
_MESSAGES_PER_TURN = 256
_LIMIT_S = 2.0
_ETHER_IPV4, _ETHER_ARP = 0x0800, 0x0806


class RingLog:
    """
    Reports drops of one NFLOG group. `attribute` finds the sandbox of an interface index.

    What was dropped behind the bridge has the bridge's index unless the kernel remembers the port:
    `by_source` then finds the sandbox by the packet's address, which the ports vouch for. Listens in the
    network namespace at `namespace`, None is our own.
    """

    def __init__(
        self,
        group: int,
        attribute: Callable[[int], str],
        report: Callable[[RingEvent], None],
        *,
        by_source: Callable[[str], str] = lambda _address: "",
        namespace: Path | None = None,
    ) -> None:
        self._group = group
        self._attribute = attribute
        self._report = report
        self._by_source = by_source
        self._namespace = namespace
        self._socket: socket.socket | None = None
        self._lost = 0

    def open(self) -> None:
        """
        Subscribe to the group; events come on the running loop.

        Raises `Unavailable` when the kernel has no NFLOG or somebody else has the group.
        """
        # A socket stays in the namespace it was made in, whoever reads it.
        netlink = in_netns(
            self._namespace, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        )
        try:
            netlink.settimeout(_LIMIT_S)
            netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            netlink.bind((0, 0))
            self._configure(netlink, _CMD, struct.pack("=B", _BIND))
            self._configure(netlink, _MODE, struct.pack(">IBx", _COPY_BYTES, _COPY_PACKET))
            # Left alone the kernel gathers 100 packets or a second's: a short run would end before
            # its records come. The rules bound the rate already.
            self._configure(netlink, _THRESHOLD, struct.pack(">I", 1))
        except OSError as error:
            netlink.close()
            raise Unavailable(f"cannot read NFLOG group {self._group}: {error.strerror or error}") from error
        netlink.setblocking(False)
        self._socket = netlink
        asyncio.get_running_loop().add_reader(netlink.fileno(), self._readable)

    def close(self) -> None:
        """
        Stop reporting; not open is fine.
        """
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _configure(self, netlink: socket.socket, kind: int, value: bytes) -> None:
        padded = value + bytes(-len(value) % 4)
        body = struct.pack(">BBH", 0, 0, self._group) + _ATTRIBUTE.pack(4 + len(value), kind) + padded
        netlink.send(_HEADER.pack(16 + len(body), _CONFIG, _REQUEST | _ACK, 1, 0) + body)
        answer = netlink.recv(4096)
        number = -struct.unpack_from("=i", answer, 16)[0]
        if number:
            raise OSError(number, "refused by the kernel" if number != errno.EBUSY else "the group is taken")

    def _readable(self) -> None:
        for _turn in range(_MESSAGES_PER_TURN):
            if self._socket is None:
                return
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self._lost += 1
                    continue
                log.warning("engines_ring_log_failed", error=str(error))
                self.close()
                return
            for event in self._events(data):
                self._report(event)

    def _events(self, data: bytes) -> Iterator[RingEvent]:
        at = 0
        while at + 20 <= len(data):
            length, kind, _flags, _sequence, _pid = _HEADER.unpack_from(data, at)
            if length < 20:
                return
            if kind == _PACKET:
                lost, self._lost = self._lost, 0
                event = parse_record(data[at + 20 : at + length], self._attribute, lost)
                yield event if event.sandbox_id else replace(event, sandbox_id=self._by_source(event.source))
            at += (length + 3) & ~3


def parse_record(attributes: bytes, attribute: Callable[[int], str], lost: int) -> RingEvent:
    """
    Read one record of the kernel; whatever the dropped frame holds, this does not fail.
    """
    values = dict(_attributes(attributes))
    ether_type = struct.unpack_from(">H", values.get(_PACKET_HEADER, b"\0\0"))[0]
    interface = values.get(_PHYSINDEV) or values.get(_INDEV) or bytes(4)
    source, destination, protocol, source_port, port = _packet(ether_type, values.get(_PAYLOAD, b""))
    return RingEvent(
        time_unix_ns=time.time_ns(),
        sandbox_id=attribute(struct.unpack(">I", interface)[0]),
        reason=values.get(_PREFIX, b"").rstrip(b"\0").decode("ascii", "replace") or "no_route",
        ether_type=ether_type,
        source=source,
        destination=destination,
        protocol=protocol,
        source_port=source_port,
        destination_port=port,
        lost=lost,
    )


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            return
        yield kind & 0x7FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def _packet(ether_type: int, payload: bytes) -> tuple[str, str, int, int, int]:
    if ether_type == _ETHER_ARP and len(payload) >= 28:
        return socket.inet_ntoa(payload[14:18]), socket.inet_ntoa(payload[24:28]), 0, 0, 0
    if ether_type != _ETHER_IPV4 or len(payload) < 20:
        return "", "", 0, 0, 0
    size, protocol = (payload[0] & 0x0F) * 4, payload[9]
    source_port = port = 0
    if protocol in {6, 17} and len(payload) >= size + 4:
        source_port, port = struct.unpack_from(">HH", payload, size)
    return socket.inet_ntoa(payload[12:16]), socket.inet_ntoa(payload[16:20]), protocol, source_port, port
