"""
One question to one forwarder.
"""

from __future__ import annotations

import asyncio
import socket

import dns.message
import pytest

from clawker_cp.dns.exchange import Forwarder, exchange, randomised
from clawker_cp.errors import Unavailable
from clawker_cp.testing.dns_world import Resolver

QUESTION = b"\3www\7example\3com\0\0\1\0\1"
RECORDS = {("www.example.com", "A"): ["@ 60 A 203.0.113.1"]}


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.0.2.1", "192.0.2.1", 53),
        ("192.0.2.1:5353", "192.0.2.1", 5353),
        ("2001:db8::1", "2001:db8::1", 53),
        ("[2001:db8::1]:54", "2001:db8::1", 54),
        ("[2001:db8::1]", "2001:db8::1", 53),
    ],
)
def test_forwarder_text(text: str, host: str, port: int) -> None:
    """Addresses with and without ports are read."""
    assert Forwarder.parse(text) == Forwarder(host, port)


@pytest.mark.parametrize("text", ["", ":53", "192.0.2.1:", "192.0.2.1:x", "192.0.2.1:0", "192.0.2.1:70000"])
def test_forwarder_text_that_is_none(text: str) -> None:
    """Anything else is refused with the text."""
    with pytest.raises(ValueError, match="forwarder"):
        Forwarder.parse(text)


def test_case_is_random_and_nothing_else() -> None:
    """Only letters of the name change."""
    seen = {randomised(QUESTION) for _ in range(64)}
    assert len(seen) > 32
    assert {one.lower() for one in seen} == {QUESTION}
    assert all(one[-4:] == QUESTION[-4:] for one in seen)


async def test_forged_answers_are_ignored() -> None:
    """Datagrams of a wrong id or question do not end the wait; the right one does."""
    loop = asyncio.get_running_loop()
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)

        async def serve() -> None:
            data, peer = await loop.sock_recvfrom(server, 2048)
            good = dns.message.make_response(dns.message.from_wire(data)).to_wire()
            other = dns.message.make_response(dns.message.make_query("evil.example", "A", id=0)).to_wire()
            for reply in (b"", b"x" * 20, bytes((good[0] ^ 1,)) + good[1:], good[:2] + other[2:], data, good):
                await loop.sock_sendto(server, reply, peer)

        async with asyncio.TaskGroup() as group:
            group.create_task(serve())
            message = await exchange(Forwarder("127.0.0.1", server.getsockname()[1]), QUESTION, 5)
        assert dns.message.from_wire(message).question[0].name.to_text().lower() == "www.example.com."


async def test_too_much_garbage_ends_the_try() -> None:
    """A sender that floods wrong answers costs one try, not the timeout."""
    loop = asyncio.get_running_loop()
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)

        async def serve() -> None:
            _, peer = await loop.sock_recvfrom(server, 2048)
            for _ in range(40):
                await loop.sock_sendto(server, b"garbage", peer)

        async with asyncio.TaskGroup() as group:
            group.create_task(serve())
            with pytest.raises(Unavailable, match="answer nothing"):
                await exchange(Forwarder("127.0.0.1", server.getsockname()[1]), QUESTION, 5)


async def test_silence_and_closed_ports() -> None:
    """No answer is Unavailable after the timeout, a closed port at once."""
    resolver = Resolver(RECORDS)
    resolver.silent = True
    async with resolver.serve():
        with pytest.raises(Unavailable, match="in time"):
            await exchange(Forwarder.parse(resolver.address), QUESTION, 0.05)
    with pytest.raises(Unavailable, match="refused"):
        await exchange(Forwarder.parse(resolver.address), QUESTION, 5)


async def test_stopping_leaves_no_socket() -> None:
    """Cancelled while it waits, the question closes its socket."""
    resolver = Resolver(RECORDS)
    resolver.held = asyncio.Event()
    async with resolver.serve(), asyncio.TaskGroup() as group:
        task = group.create_task(exchange(Forwarder.parse(resolver.address), QUESTION, 5))
        async with asyncio.timeout(5):
            while not resolver.asked:
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
