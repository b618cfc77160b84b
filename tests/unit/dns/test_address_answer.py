"""Answers of addresses, read and written without dnspython: the same as with it, or left to it."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import dns.exception
import dns.message
import dns.name
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawker_cp.dns import resolved
from clawker_cp.dns.address_answer import HEADER, Shape, read_addresses
from clawker_cp.dns.addresses import AddressFilter

EVERYTHING = AddressFilter()
NAMES = ["www.example.com", "WWW.Example.com", "cdn.example.com", "com", "e7.cdn.net", "a.b.c.d.e.f.example.com"]
TYPES = {"A": 1, "AAAA": 28}


def asked(name: str, kind: str) -> bytes:
    """The question of a query in wire form."""
    wire = dns.name.from_text(name).to_wire()
    assert wire is not None
    return wire + struct.pack("!HH", TYPES.get(kind, 16), 1)


def answered(name: str, kind: str, *records: str) -> bytes:
    """A forwarder's message with records `owner TTL TYPE DATA`, each on its own also where they are one set."""
    reply = dns.message.make_response(dns.message.make_query(name, kind))
    for text in records:
        owner, ttl, kind_of, data = text.split(" ", 3)
        reply.answer.append(dns.rrset.from_text(owner.rstrip(".") + ".", int(ttl), "IN", kind_of, data))
    return reply.to_wire()


def message_of(question: bytes, shape: Shape) -> dns.message.Message:
    """What a client reads."""
    head = struct.pack("!6H", 1, 0x8180, 1, shape.answers, shape.authority, 0)
    return dns.message.from_wire(head + question + shape.body)


def sets(message: dns.message.Message) -> set[tuple[str, int, int, frozenset[str]]]:
    """The answer section, whatever its order and case."""
    return {
        (str(one.name).lower(), one.rdtype, one.ttl, frozenset(str(each).lower() for each in one))
        for one in message.answer
    }


def slow(message: bytes, question: bytes) -> tuple[Shape, int]:
    """The same by dnspython: what goes out, and how long it may be kept."""
    rcode, life_s, records = resolved._parsed(message, struct.unpack("!H", question[-4:-2])[0])
    assert isinstance(records, tuple)
    return resolved._write(question, rcode, records, EVERYTHING, private=True)[0], life_s


def same(message: bytes, question: bytes) -> None:
    """Both ways say the same of a message that is read here."""
    plain = read_addresses(message, question)
    assert plain is not None
    shape, _ = plain.write(question, EVERYTHING, private=True)
    other, life_s = slow(message, question)
    assert sets(message_of(question, shape)) == sets(message_of(question, other))
    assert (sorted(shape.rows), sorted(shape.addresses), shape.refused, shape.authority, plain.ttl) == (
        sorted(other.rows), sorted(other.addresses), other.refused, other.authority, life_s,
    )  # fmt: skip
    for offset in shape.ttl_offsets:
        assert struct.unpack_from("!I", shape.body, offset)[0] in {record.ttl for record in plain._records}


@pytest.mark.parametrize(
    "records",
    [
        ["www.example.com 60 A 203.0.113.1"],
        ["www.example.com 60 A 203.0.113.1", "www.example.com 30 A 203.0.113.2"],
        ["www.example.com 60 A 203.0.113.1", "www.example.com 30 A 203.0.113.1"],
        ["www.example.com 9 CNAME e7.cdn.net.", "e7.cdn.net 60 A 203.0.113.1"],
        ["e7.cdn.net 60 A 203.0.113.1", "www.example.com 9 CNAME e7.cdn.net."],
        ["www.example.com 9 CNAME a.example.com.", "a.example.com 9 CNAME b.a.example.com.",
         "b.a.example.com 0 A 192.0.2.4"],
        ["www.example.com 9 CNAME www.example.com.", "www.example.com 60 A 203.0.113.1"],
        ["www.example.com 9 CNAME .", ". 60 A 203.0.113.1"],
    ],
    ids=["one", "two", "twice the same", "alias", "alias last", "chain", "loop", "root"],
)  # fmt: skip
def test_addresses_are_what_dnspython_reads(records: list[str]) -> None:
    """Sets, aliases and chains go out as dnspython would write them, with the least TTL of a set."""
    same(answered("www.example.com", "A", *records), asked("www.example.com", "A"))


@given(
    st.sampled_from(["A", "AAAA"]),
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 90_000), st.integers(1, 9)), min_size=1, max_size=8),
    st.dictionaries(st.sampled_from(NAMES[1:]), st.sampled_from(NAMES), max_size=4),
)
def test_any_set_of_addresses_is_what_dnspython_reads(
    kind: str, addresses: list[tuple[str, int, int]], aliases: dict[str, str]
) -> None:
    """Whatever addresses and aliases a message holds, in whatever order and case, both ways say the same."""
    base = "203.0.113." if kind == "A" else "2001:db8::"
    records = [f"{name} 5 CNAME {target}." for name, target in aliases.items()]
    records += [f"{name} {ttl} {kind} {base}{last}" for name, ttl, last in addresses]
    same(answered("www.example.com", kind, *records), asked("www.example.com", kind))


def test_private_addresses_are_left_out() -> None:
    """An address that a client may not have is in none of its octets, and the other client gets all."""
    question = asked("www.example.com", "A")
    message = answered("www.example.com", "A", "www.example.com 5 A 10.0.0.1", "www.example.com 5 A 203.0.113.1")
    plain = read_addresses(message, question)
    assert plain is not None
    public, whole = plain.write(question, EVERYTHING, private=False)
    assert (public.addresses, public.answers, whole) == ((ip_address("203.0.113.1").packed,), 1, False)
    assert plain.write(question, EVERYTHING, private=True)[1]


def with_signature() -> bytes:
    signature = "RRSIG A 8 2 60 20300101000000 20200101000000 1 a.example. AAAA"
    return answered("www.example.com", "A", "www.example.com 5 A 203.0.113.1", f"www.example.com 5 {signature}")


def changed(at: int, octets: bytes) -> bytes:
    """A plain answer with some octets replaced."""
    message = answered("www.example.com", "A", "www.example.com 5 A 203.0.113.1")
    return message[:at] + octets + message[at + len(octets) :]


def chained(pointers: int) -> bytes:
    """A plain answer, and an additional record whose owner is so many pointers, each to the one before it."""
    message = answered("www.example.com", "A", "www.example.com 5 A 203.0.113.1")
    chain, before = bytearray(), HEADER
    for _ in range(pointers - 1):
        chain += struct.pack("!H", 0xC000 | before)
        before = len(message) + 12 + len(chain) - 2
    unknown = b"\xc0\x0c" + struct.pack("!HHIH", 65000, 1, 5, len(chain)) + chain
    owned = struct.pack("!HHHIH", 0xC000 | before, 65000, 1, 5, 0)
    return message[:11] + b"\2" + message[12:] + unknown + owned


QUESTION = asked("www.example.com", "A")
RECORD = HEADER + len(QUESTION)


@pytest.mark.parametrize(
    ("message", "question"),
    [
        (with_signature(), QUESTION),
        (answered("www.example.com", "A"), QUESTION),
        (answered("www.example.com", "A", "www.example.com 5 CNAME a.example."), QUESTION),
        (answered("www.example.com", "A", "www.example.com 5 AAAA 2001:db8::1"), QUESTION),
        (answered("www.example.com", "TXT", "www.example.com 5 TXT x"), asked("www.example.com", "TXT")),
        (answered("other.example", "A", "other.example 5 A 203.0.113.1"), QUESTION),
        (changed(3, b"\x83"), QUESTION),
        (changed(RECORD + 4, b"\0\3"), QUESTION),
        (changed(RECORD + 6, b"\x80"), QUESTION),
        (changed(RECORD + 10, b"\0\5"), QUESTION),
        (changed(RECORD, struct.pack("!H", 0xC000 | RECORD)), QUESTION),
        (changed(RECORD, b"\xc0\2"), QUESTION),
        (changed(RECORD, b"\x40"), QUESTION),
        (chained(17), QUESTION),
        (changed(11, b"\1"), QUESTION),
        (changed(11, b"\1") + b"\0\0\x29\4\xd0\1\0\0\0\0\0", QUESTION),
    ],
    ids=[
        "signature", "nothing", "alias alone", "other type", "text", "other question", "name does not exist",
        "other class", "negative TTL", "too long", "pointer to itself", "pointer into the header", "unknown label",
        "chain of pointers", "record missing", "extended code",
    ],
)  # fmt: skip
def test_everything_else_is_left_to_dnspython(message: bytes, question: bytes) -> None:
    """Whatever is not exactly addresses and aliases of class IN, whole and without an error, is not judged here."""
    assert read_addresses(message, question) is None


def test_pointers_up_to_the_bound_are_followed() -> None:
    """Sixteen pointers in one name are read, as dnspython reads them; thousands would hold the loop."""
    assert read_addresses(chained(16), QUESTION) is not None
    dns.message.from_wire(chained(16))
    assert read_addresses(chained(8000), QUESTION) is None


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.integers(0, 40))
def test_damage_never_reads_otherwise(changes: list[tuple[int, int]], cut: int) -> None:
    """A damaged message is left to dnspython, or its answer section is what dnspython reads of it."""
    records = ("www.example.com 9 CNAME e7.cdn.net.", "e7.cdn.net 60 A 203.0.113.1", "e7.cdn.net 60 A 203.0.113.2")
    damaged = bytearray(answered("www.example.com", "A", *records))
    for position, octet in changes:
        damaged[position % len(damaged)] = octet
    message = bytes(damaged[: len(damaged) - cut])
    if len(message) < HEADER or (plain := read_addresses(message, QUESTION)) is None:
        return
    shape, _ = plain.write(QUESTION, EVERYTHING, private=True)
    try:
        other, _ = slow(message, QUESTION)
    except (dns.exception.DNSException, ValueError, struct.error):
        message_of(QUESTION, shape)  # an unread section was damaged; what goes out can be read
        return
    assert sets(message_of(QUESTION, shape)) == sets(message_of(QUESTION, other))
