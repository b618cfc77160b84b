"""Client and server exchange streams once and JSON objects line by line over a UNIX socket."""

from __future__ import annotations

import os
import socket

import pytest

from clawker_cp.errors import InvalidInput
from clawker_cp.rpc.local_protocol import LocalChannel, peer_credentials, receive_streams


def pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    one.setblocking(False)
    other.setblocking(False)
    return one, other


async def test_objects_arrive_in_order_until_the_end() -> None:
    """Every object arrives whole, and the end of the stream is None."""
    one, other = pair()
    left, right = await LocalChannel.over(one), await LocalChannel.over(other)
    try:
        await left.send({"op": "run", "text": "ü\n"})
        await left.send({"op": "signal", "signo": 15})
        assert await right.receive() == {"op": "run", "text": "ü\n"}
        assert await right.receive() == {"op": "signal", "signo": 15}
        await left.aclose()
        assert await right.receive() is None
    finally:
        await left.aclose()
        await right.aclose()


@pytest.mark.parametrize(("sent", "said"), [(b"{\n", "not JSON"), (b"[1]\n", "not a JSON object")])
async def test_other_lines_are_refused(sent: bytes, said: str) -> None:
    """A line that is no JSON object is an error that says so."""
    one, other = pair()
    channel = await LocalChannel.over(other)
    try:
        one.send(sent)
        with pytest.raises(InvalidInput, match=said):
            await channel.receive()
    finally:
        one.close()
        await channel.aclose()


async def test_half_a_line_is_the_end() -> None:
    """What a peer that dies left unfinished is not taken for a message."""
    one, other = pair()
    channel = await LocalChannel.over(other)
    try:
        one.send(b'{"op":"run"}')
        one.close()
        assert await channel.receive() is None
    finally:
        await channel.aclose()


async def test_three_streams_are_handed_over() -> None:
    """The received descriptors are the sender's files; fewer than three are refused and closed."""
    one, other = pair()
    read, write = os.pipe()
    try:
        socket.send_fds(one, [b"\0"], [read, write, write])
        streams = await receive_streams(other, 1)
        try:
            assert [os.fstat(fd).st_ino for fd in streams] == [os.fstat(read).st_ino] * 3
            assert not any(os.get_inheritable(fd) for fd in streams)
        finally:
            for fd in streams:
                os.close(fd)
        socket.send_fds(one, [b"\0"], [read])
        with pytest.raises(InvalidInput, match="got 1"):
            await receive_streams(other, 1)
    finally:
        os.close(read)
        os.close(write)
        one.close()
        other.close()


def test_the_kernel_attests_the_peer() -> None:
    """Pid, uid and gid of the other end are this process's own."""
    one, other = pair()
    with one, other:
        assert peer_credentials(one) == (os.getpid(), os.geteuid(), os.getegid())
