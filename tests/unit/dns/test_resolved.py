"""
Answers of forwarders, reduced and written, and their cache.
"""

from __future__ import annotations

import ipaddress
import struct

import dns.message
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.accel import build_reply, parse_query
from clawker_cp.dns.addresses import AddressFilter
from clawker_cp.dns.resolved import AnswerCache, Resolved, negative_authority, read_answer

S = 1_000_000_000
PUBLIC = AddressFilter()


def forwarded(name: str, kind: str, *records: str, authority: str = "", rcode: int = 0) -> tuple[bytes, bytes, bytes]:
    """Return our query, its question and a forwarder's message of `owner TTL TYPE DATA` records."""
    query = dns.message.make_query(name, kind)
    reply = dns.message.make_response(query)
    reply.set_rcode(dns.rcode.Rcode(rcode))
    for text in records:
        owner, ttl, kind_of, data = text.split(" ", 3)
        reply.answer.append(dns.rrset.from_text(owner, int(ttl), "IN", kind_of, data))
    if authority:
        owner, ttl, kind_of, data = authority.split(" ", 3)
        reply.authority.append(dns.rrset.from_text(owner, int(ttl), "IN", kind_of, data))
    raw = query.to_wire()
    parsed = parse_query(raw)
    assert parsed is not None
    return raw, parsed.key + b"\0\1", reply.to_wire()


def written(raw: bytes, known: Resolved, *, private: bool = False, age_s: int = 0) -> dns.message.Message:
    query = parse_query(raw)
    assert query is not None
    shape = known.shape(PUBLIC, private=private)
    return dns.message.from_wire(
        build_reply(
            query, known.rcode, shape.body, shape.answers, shape.authority, shape.ttl_offsets, age_s, b"", 65535
        )
    )


def test_alias_chain_survives() -> None:
    """Aliases and addresses come out as they went in, compressed against the question."""
    raw, question, message = forwarded(
        "www.example.com", "A", "www.example.com. 500 CNAME x.example.com.", "x.example.com. 60 A 203.0.113.1"
    )
    known = read_answer(message, question, now_ns=0)
    assert [found.to_text() for found in written(raw, known).answer] == [
        "www.example.com. 300 IN CNAME x.example.com.",
        "x.example.com. 60 IN A 203.0.113.1",
    ]
    assert known.expires_ns == 60 * S
    shape = known.shape(PUBLIC, private=False)
    assert shape.rows == ((bytes(10) + b"\xff\xff" + ipaddress.ip_address("203.0.113.1").packed, 60),)


def test_ttl_counts_down() -> None:
    """What is left of a TTL goes out."""
    raw, question, message = forwarded("a.example", "A", "a.example. 200 A 203.0.113.1")
    assert written(raw, read_answer(message, question, now_ns=0), age_s=50).answer[0].ttl == 150


def test_unasked_records_are_dropped() -> None:
    """Only the asked type and aliases pass; signatures and strangers do not."""
    raw, question, message = forwarded(
        "a.example",
        "TXT",
        'a.example. 60 TXT "x"',
        "a.example. 60 A 203.0.113.1",
        "a.example. 60 RRSIG TXT 8 2 60 20300101000000 20200101000000 1 a.example. AAAA",
    )
    known = read_answer(message, question, now_ns=0)
    assert [found.rdtype for found in written(raw, known).answer] == [dns.rdatatype.TXT]
    assert known.shape(PUBLIC, private=False).rows == ()


def test_addresses_by_client() -> None:
    """Private addresses are in the octets of those who may have them and in no others."""
    raw, question, message = forwarded("a.example", "A", "a.example. 60 A 10.0.0.1", "a.example. 60 A 203.0.113.1")
    known = read_answer(message, question, now_ns=0)
    assert len(written(raw, known).answer[0]) == 1
    assert sum(len(found) for found in written(raw, known, private=True).answer) == 2


def test_parsed_records_are_not_kept() -> None:
    """Once written, an answer of which nothing was dropped is only octets; one with drops keeps its records."""
    for address, kept in (("203.0.113.1", False), ("10.0.0.1", True)):
        raw, question, message = forwarded("a.example", "A", f"a.example. 60 A {address}")
        known = read_answer(message, question, now_ns=0)
        known.shape(PUBLIC, private=False)
        assert (known.records != ()) is kept
        assert len(written(raw, known, private=True).answer[0]) == 1


def test_nothing_left_is_refused() -> None:
    """An answer whose addresses are all dropped is marked so."""
    _, question, message = forwarded("a.example", "A", "a.example. 60 A 127.0.0.1")
    assert read_answer(message, question, now_ns=0).shape(PUBLIC, private=True).refused


@pytest.mark.parametrize(
    ("authority", "life_s"),
    [
        ("example. 60 SOA . . 1 1 1 1 40", 40),
        ("example. 30 SOA . . 1 1 1 1 40", 30),
        ("", 5),
        ("example. 9999 SOA . . 1 1 1 1 9999", 300),
    ],
)
def test_negative_answers(authority: str, life_s: int) -> None:
    """What does not exist is remembered as long as its SOA says, at most 300 s, and goes out with our SOA."""
    raw, question, message = forwarded("gone.example", "A", authority=authority, rcode=3)
    known = read_answer(message, question, now_ns=0)
    assert (known.rcode, known.expires_ns) == (3, life_s * S)
    assert written(raw, known).authority[0].to_text() == "example. 1 IN SOA clawker. gate.clawker. 1 1 1 1 1"


def test_service_records_without_mandatory_left() -> None:
    """A mandatory list of nothing but removed parameters goes as well."""
    raw, question, message = forwarded(
        "a.example", "HTTPS", "a.example. 60 HTTPS 1 . mandatory=ipv4hint ipv4hint=203.0.113.1 port=8443"
    )
    assert written(raw, read_answer(message, question, now_ns=0)).answer[0].to_text().endswith('HTTPS 1 . port="8443"')


def test_alias_service_record() -> None:
    """An alias form without parameters stays."""
    raw, question, message = forwarded("a.example", "SVCB", "a.example. 60 SVCB 0 b.example.")
    assert written(raw, read_answer(message, question, now_ns=0)).answer[0].to_text().endswith("SVCB 0 b.example.")


def test_flood_of_records_is_refused() -> None:
    """A message that claims hundreds of records is not even read."""
    _, question, message = forwarded("a.example", "A")
    with pytest.raises(ValueError, match="records"):
        read_answer(message[:6] + b"\xff\xff" + message[8:], question, now_ns=0)


def test_owner_of_the_soa() -> None:
    """The SOA stands at the parent of the question, the root for a top-level name."""
    assert negative_authority(b"\3www\7example\0\0\1\0\1")[:2] == b"\xc0\x10"
    assert negative_authority(b"\7example\0\0\1\0\1")[0] == 0
    assert negative_authority(b"\0\0\1\0\1")[0] == 0


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8))
def test_mutated_messages(changes: list[tuple[int, int]]) -> None:
    """A damaged message raises what the forwarders expect, or gives an answer that can be read."""
    raw, question, message = forwarded(
        "www.example.com", "A", "www.example.com. 500 CNAME x.example.com.", "x.example.com. 60 A 203.0.113.1"
    )
    damaged = bytearray(message)
    for position, octet in changes:
        damaged[12 + position % (len(damaged) - 12)] = octet
    try:
        known = read_answer(bytes(damaged), question, now_ns=0)
    except (dns.exception.DNSException, ValueError):
        return
    written(raw, known)


def answer(size: int = 0) -> Resolved:
    return Resolved(b"\1a\0\0\1\0\1", 0, (), received_ns=0, life_s=1, size=size)


def test_cache_is_bounded_by_number() -> None:
    """The oldest goes when there is no room."""
    cache = AnswerCache(entries=3, size_bytes=1 << 20)
    for number in range(5):
        cache.put(struct.pack("!B", number), answer())
    assert len(cache) == 3
    assert cache.get(b"\0") is None
    assert cache.get(b"\4") is not None


def test_cache_is_bounded_by_octets() -> None:
    """Large answers push out others, and one larger than everything is not kept."""
    cache = AnswerCache(entries=100, size_bytes=10_000)
    for number in range(100):
        cache.put(struct.pack("!B", number), answer(1000))
    assert cache.size_bytes <= 10_000
    cache.put(b"big", answer(20_000))
    assert cache.get(b"big") is None
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


def test_cache_replaces() -> None:
    """A newer answer takes the place of the older one, in the count of octets too."""
    cache = AnswerCache(entries=2, size_bytes=1 << 20)
    cache.put(b"a", answer(100))
    cache.put(b"a", answer(200))
    assert (len(cache), cache.size_bytes) == (1, 712)
