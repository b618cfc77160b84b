"""
One question to one forwarder: UDP from a random port, random id, 0x20, TCP when it has to be.

Says what came back or raises; retrying and choosing is `forwarders.py`.
"""

from __future__ import annotations

import asyncio
import os
import struct
from dataclasses import dataclass

from clawker_cp.errors import Unavailable

_OPT = b"\0" + struct.pack("!HHIH", 41, 1232, 0, 0)
_RD = 0x0100
HEADER = 12
MAX_UDP_GARBAGE = 16  # datagrams of a wrong id or question that are ignored before the try counts as failed


@dataclass(frozen=True, slots=True)
class Forwarder:
    """Where a resolver listens."""

    host: str
    port: int = 53

    @classmethod
    def parse(cls, text: str) -> Forwarder:
        """Read `ADDRESS`, `ADDRESS:PORT` or `[ADDRESS]:PORT`; raises ValueError."""
        host, port = text, "53"
        if text.startswith("["):
            host, _, rest = text[1:].partition("]")
            port = rest.removeprefix(":") or "53"
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        if not port.isdigit() or not 0 < int(port) < 65536 or not host:
            raise ValueError(f"forwarder {text!r}: expected ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT")
        return cls(host, int(port))


def randomised(question: bytes) -> bytes:
    """Return the question with the case of every letter of its name chosen by chance (0x20)."""
    name, rest = question[:-4], question[-4:]
    noise = os.urandom(len(name))
    # Length octets are at most 63 and so never letters.
    return (
        bytes(o ^ 0x20 if n & 1 and (65 <= o <= 90 or 97 <= o <= 122) else o for o, n in zip(name, noise, strict=True))
        + rest
    )


async def exchange(forwarder: Forwarder, question: bytes, timeout_s: float) -> bytes:
    """
    Ask one forwarder and return its message, whose id and question are ours.

    Raises Unavailable, chained, when it cannot be reached, is silent for `timeout_s` or talks nonsense.
    """
    asked = randomised(question)
    try:
        async with asyncio.timeout(timeout_s):
            message = await _over_udp(forwarder, asked)
            if message is None or message[2] & 2:
                message = await _over_tcp(forwarder, asked)
    except (OSError, EOFError, ValueError) as error:
        why = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        raise Unavailable(f"forwarder {forwarder.host} port {forwarder.port}: {why}") from error
    return message


def _query(asked: bytes) -> bytes:
    return struct.pack("!2s5H", os.urandom(2), _RD, 1, 0, 0, 1) + asked + _OPT


def _is_reply(message: bytes, query: bytes) -> bool:
    return len(message) >= HEADER and message[:2] == query[:2] and message[2] & 0xF8 == 0x80 and message[4:6] == b"\0\1"


class _Once(asyncio.DatagramProtocol):
    """Wait for the one datagram that answers; None = right but for the case, to be asked again over TCP."""

    def __init__(self, query: bytes, asked: bytes) -> None:
        self._query = query
        self._asked = asked
        self._garbage = 0
        self.answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        """Take the answer; ignore what somebody else may have sent."""
        if self.answer.done():
            return
        theirs = data[HEADER : HEADER + len(self._asked)]
        if _is_reply(data, self._query) and theirs == self._asked:
            self.answer.set_result(data)
        elif _is_reply(data, self._query) and theirs.lower() == self._asked.lower():
            # A forwarder that does not keep the case, or a guess: only TCP can tell them apart.
            self.answer.set_result(None)
        else:
            self._garbage += 1
            if self._garbage > MAX_UDP_GARBAGE:
                self.answer.set_exception(ValueError("too many datagrams that answer nothing"))

    def error_received(self, exc: Exception) -> None:
        """End the wait: the port is closed or there is no route."""
        if not self.answer.done():
            self.answer.set_exception(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the wait with the socket."""
        if not self.answer.done():
            self.answer.set_exception(exc or OSError("socket closed"))


async def _over_udp(forwarder: Forwarder, asked: bytes) -> bytes | None:
    query = _query(asked)
    loop = asyncio.get_running_loop()
    # A socket of its own per question: the kernel picks the port by chance and other senders do not reach it.
    transport, protocol = await loop.create_datagram_endpoint(
        lambda: _Once(query, asked), remote_addr=(forwarder.host, forwarder.port)
    )
    try:
        transport.sendto(query)
        return await protocol.answer
    finally:
        if not protocol.answer.done():
            protocol.answer.cancel()
        transport.abort()


async def _over_tcp(forwarder: Forwarder, asked: bytes) -> bytes:
    query = _query(asked)
    reader, writer = await asyncio.open_connection(forwarder.host, forwarder.port)
    try:
        writer.write(struct.pack("!H", len(query)) + query)
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        message = await reader.readexactly(size)
    finally:
        writer.transport.abort()
    if not _is_reply(message, query) or message[HEADER : HEADER + len(asked)].lower() != asked.lower():
        raise ValueError("the answer over TCP is to another question")
    return message
