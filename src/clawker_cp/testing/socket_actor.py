"""
A process that does with sockets what it is told, one JSON line at a time; see `socket_world`.

Started inside a network namespace and a cgroup, it plays an agent, or the outside with servers
that answer which of them was reached and remember what arrived.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SOCKETS: dict[int, socket.socket] = {}
RECEIVED: list[dict[str, Any]] = []
CHANNEL_FD = int(sys.argv[1]) if len(sys.argv) > 1 else -1  # a UNIX socket to pass sockets through
_KEPT = threading.Lock()


def _keep(opened: socket.socket) -> int:
    SOCKETS[opened.fileno()] = opened
    return opened.fileno()


def make(family: int, kind: int, protocol: int = 0) -> int:
    """Make a socket; its number is the handle."""
    return _keep(socket.socket(family, kind, protocol))


def connect(handle: int, addr: str, port: int, limit_s: float = 2.0) -> float:
    """Connect; returns the milliseconds it took."""
    SOCKETS[handle].settimeout(limit_s)
    started = time.monotonic()
    SOCKETS[handle].connect((addr, port))
    return (time.monotonic() - started) * 1000


def connect_often(handle: int, addr: str, port: int, times: int) -> float:
    """Connect one datagram socket again and again, refused or not; returns nanoseconds a call."""
    opened, there = SOCKETS[handle], (addr, port)
    started = time.perf_counter_ns()
    for _ in range(times):
        with contextlib.suppress(OSError):
            opened.connect(there)
    return (time.perf_counter_ns() - started) / times


def disconnect(handle: int) -> None:
    """Connect to AF_UNSPEC, which ends a UDP socket's association."""
    unspec = struct.pack("<H14x", socket.AF_UNSPEC)
    if ctypes.CDLL(None, use_errno=True).connect(handle, unspec, len(unspec)):
        raise OSError(ctypes.get_errno(), "connect to AF_UNSPEC")


def send(handle: int, data: str, flags: int = 0) -> int:
    return SOCKETS[handle].send(data.encode(), flags)


def sendto(handle: int, data: str, addr: str, port: int, flags: int = 0) -> int:
    return SOCKETS[handle].sendto(data.encode(), flags, (addr, port))


def send_unspec(handle: int, data: str, addr: str, port: int) -> int:
    """Send with an address whose family says AF_UNSPEC, which Linux takes for IPv4."""
    to = struct.pack(">2xH4s8x", port, socket.inet_aton(addr))
    sent = ctypes.CDLL(None, use_errno=True).sendto(handle, data.encode(), len(data), 0, to, len(to))
    if sent < 0:
        raise OSError(ctypes.get_errno(), "sendto")
    return int(sent)


def send_with(handle: int, data: str, addr: str, port: int, level: int, kind: int, value: str) -> int:
    """Send with one piece of ancillary data, given in hex."""
    ancillary = [(level, kind, bytes.fromhex(value))]
    return SOCKETS[handle].sendmsg([data.encode()], ancillary, 0, (addr, port))


def receive(handle: int, limit_s: float = 2.0) -> list[Any]:
    """[data, [address, port]]; for TCP the address is empty."""
    SOCKETS[handle].settimeout(limit_s)
    data, sender = SOCKETS[handle].recvfrom(65536)
    return [data.decode(), list(sender[:2]) if sender else []]


def peer(handle: int) -> list[Any]:
    return list(SOCKETS[handle].getpeername()[:2])


def own(handle: int) -> list[Any]:
    return list(SOCKETS[handle].getsockname()[:2])


def option(handle: int, level: int, name: int, value: str) -> None:
    """Set an option to a value given in hex."""
    SOCKETS[handle].setsockopt(level, name, bytes.fromhex(value))


def bind(handle: int, addr: str, port: int) -> None:
    SOCKETS[handle].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    SOCKETS[handle].bind((addr, port))


def listen(handle: int) -> None:
    SOCKETS[handle].listen(8)


def accept(handle: int, limit_s: float = 2.0) -> int:
    SOCKETS[handle].settimeout(limit_s)
    return _keep(SOCKETS[handle].accept()[0])


def close(handle: int) -> None:
    SOCKETS.pop(handle).close()


def give(handle: int) -> None:
    """Pass a socket to whoever holds the other end of the channel."""
    channel = socket.socket(fileno=CHANNEL_FD)
    try:
        rights = array.array("i", [handle])
        channel.sendmsg([b"s"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    finally:
        channel.detach()


def take() -> int:
    """Take a socket that was given."""
    channel = socket.socket(fileno=CHANNEL_FD)
    try:
        _, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(4))
    finally:
        channel.detach()
    rights = array.array("i")
    rights.frombytes(ancillary[0][2])
    return _keep(socket.socket(fileno=rights[0]))


def serve(kind: str, addr: str, port: int) -> None:
    """Answer "<addr>|<port>|<what came>" to everything that arrives there, and remember it."""
    family = socket.AF_INET6 if ":" in addr else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if kind == "tcp":
        with contextlib.suppress(OSError):
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    opened.bind((addr, port))
    if kind == "tcp":
        opened.listen(64)
    target = _tcp_server if kind == "tcp" else _udp_server
    threading.Thread(target=target, args=(opened, addr, port), daemon=True).start()


def received() -> list[dict[str, Any]]:
    """Everything that arrived since the last call."""
    with _KEPT:
        taken = RECEIVED[:]
        RECEIVED.clear()
    return taken


def _note(kind: str, addr: str, port: int, data: bytes) -> None:
    with _KEPT:
        RECEIVED.append({"kind": kind, "addr": addr, "port": port, "data": data.decode(errors="replace")})


def _tcp_server(opened: socket.socket, addr: str, port: int) -> None:
    while True:
        connection, _ = opened.accept()
        _note("tcp", addr, port, b"")
        threading.Thread(target=_tcp_connection, args=(connection, addr, port), daemon=True).start()


def _tcp_connection(connection: socket.socket, addr: str, port: int) -> None:
    with connection, contextlib.suppress(OSError):
        while data := connection.recv(65536):
            _note("tcp", addr, port, data)
            connection.sendall(f"{addr}|{port}|".encode() + data)


def _udp_server(opened: socket.socket, addr: str, port: int) -> None:
    while True:
        with contextlib.suppress(OSError):
            data, sender = opened.recvfrom(65536)
            _note("udp", addr, port, data)
            opened.sendto(f"{addr}|{port}|".encode() + data, sender)


ACTIONS: dict[str, Callable[..., Any]] = {
    one.__name__: one
    for one in (
        make, connect, connect_often, disconnect, send, sendto, send_unspec, send_with, receive, peer, own, option,
        bind, listen, accept, close, give, take, serve, received,
    )
}  # fmt: skip


def main() -> None:
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"is": ACTIONS[name](*arguments)}
        except TimeoutError:
            answer = {"error": "TIMEOUT"}
        except OSError as error:
            answer = {"error": errno.errorcode.get(error.errno or 0, str(error))}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
