"""Listing and destroying sockets of a namespace."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.engines.host.sockets import cut_sockets, list_sockets
from clawker_cp.errors import NotFound

pytestmark = pytest.mark.root


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"cktest-{os.getpid()}-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield Path("/run/netns", name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def pair(address: str, family: int = socket.AF_INET) -> tuple[socket.socket, socket.socket, socket.socket]:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen()
    client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(5)
    client.connect((address, listener.getsockname()[1]))
    return listener, client, listener.accept()[0]


def close(*sockets: socket.socket) -> None:
    for each in sockets:
        each.close()


def test_sockets_with_a_peer_are_listed_and_listeners_are_not(netns: Path) -> None:
    """Both ends of a connection are listed with their addresses; a listener has no peer to name."""
    listener, client, server = in_netns(netns, lambda: pair("127.0.0.1"))
    try:
        port, own = listener.getsockname()[1], client.getsockname()[1]
        found = {(info.source_port, info.destination_port) for info in list_sockets(netns)}
        assert found == {(own, port), (port, own)}
        assert {info.protocol for info in list_sockets(netns)} == {socket.IPPROTO_TCP}
    finally:
        close(listener, client, server)


def test_only_what_matches_is_destroyed(netns: Path) -> None:
    """The matching socket fails at once, and another connection goes on."""
    first = in_netns(netns, lambda: pair("127.0.0.1"))
    second = in_netns(netns, lambda: pair("127.0.0.1"))
    try:
        target = first[1].getsockname()[1]
        assert cut_sockets(netns, lambda info: info.source_port == target) == 1
        with pytest.raises(ConnectionAbortedError):
            first[1].recv(1)
        second[1].sendall(b"on")
        second[2].settimeout(5)
        assert second[2].recv(2) == b"on"
    finally:
        close(*first, *second)


def test_udp_with_a_peer_is_destroyed_too(netns: Path) -> None:
    """A connected UDP socket is found and cut like a TCP one."""

    def connected() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.connect(("127.0.0.1", 5353))
        return made

    with in_netns(netns, connected) as udp:
        assert cut_sockets(netns, lambda info: info.protocol == socket.IPPROTO_UDP) == 1
        with pytest.raises(ConnectionAbortedError):
            udp.recv(1)


def test_ipv4_through_an_ipv6_socket_is_named_as_ipv4(netns: Path) -> None:
    """A socket of the other family that carries IPv4 does not escape a match on the address."""
    listener, client, server = in_netns(netns, lambda: pair("::ffff:127.0.0.1", socket.AF_INET6))
    try:
        assert {info.destination for info in list_sockets(netns)} == {"127.0.0.1"}
        assert cut_sockets(netns, lambda info: info.destination == "127.0.0.1") >= 1
    finally:
        close(listener, client, server)


def test_namespace_that_is_gone_is_told() -> None:
    """Cutting in a namespace that was removed is told as not found."""
    with pytest.raises(NotFound):
        cut_sockets(Path("/run/netns/cktest-gone"), lambda _: True)
