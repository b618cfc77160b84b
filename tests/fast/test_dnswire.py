"""
Both twins of the question reader and reply writer against dnspython, and against each other.
"""

from __future__ import annotations

import struct
from typing import Any

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clawker_cp._fast import dnswire as fast
from clawker_cp._pure import dnswire as pure

FIELDS = ("id", "flags", "rcode", "qtype", "size", "edns", "odd", "name", "question", "key")
A_RECORD = bytes.fromhex("c00c00010001") + struct.pack("!IH", 600, 4) + bytes((192, 0, 2, 1))
EDE = struct.pack("!HHH", 15, 4, 15) + b"no"


@pytest.fixture(params=[pure, fast], ids=["pure", "fast"])
def wire(request: pytest.FixtureRequest) -> Any:
    return request.param


def make(name: str = "Api.Example.com", kind: str = "A", **options: Any) -> bytes:
    return dns.message.make_query(name, kind, id=0x1234, **options).to_wire()


def test_question_is_read(wire: Any) -> None:
    """Name in lower case, type, key and the client's spelling come out of a plain question."""
    query = wire.parse_query(make())
    assert (query.id, query.rcode, query.name, query.qtype, query.edns, query.odd) == (
        0x1234, 0, "api.example.com", 1, False, False,
    )  # fmt: skip
    assert query.question == b"\x03Api\x07Example\x03com\x00\x00\x01\x00\x01"
    assert query.key == b"\x03api\x07example\x03com\x00\x00\x01"
    assert query.size == 512


@pytest.mark.parametrize(("payload", "size"), [(100, 512), (512, 512), (900, 900), (1232, 1232), (4096, 1232)])
def test_client_size_is_kept_between_bounds(wire: Any, payload: int, size: int) -> None:
    """The reply size is the client's, at least 512 and at most 1,232 octets."""
    query = wire.parse_query(make(use_edns=0, payload=payload))
    assert (query.edns, query.size) == (True, size)


def test_dots_inside_labels_are_no_borders(wire: Any) -> None:
    """A label that holds a dot cannot pass for two labels."""
    name = dns.name.Name((b"evil.example", b"com", b""))
    query = wire.parse_query(dns.message.make_query(name, "A").to_wire())
    assert (query.name, query.odd) == ("evil\\046example.com", True)


def test_longest_name(wire: Any) -> None:
    """A name of 255 wire octets is read, one octet more is not."""
    labels = [b"a" * 63] * 3 + [b"b" * 61]
    packed = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    header = struct.pack("!6H", 1, 0, 1, 0, 0, 0)
    assert len(packed) == 255
    assert len(wire.parse_query(header + packed + b"\0\1\0\1").name) == 253
    longer = packed.replace(b"\x3d" + b"b" * 61, b"\x3e" + b"b" * 62)
    assert wire.parse_query(header + longer + b"\0\1\0\1").rcode == 1


HEAD = struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0)
NAME = b"\1a\0"
OPT = b"\0" + struct.pack("!HHIH", 41, 1232, 0, 0)


@pytest.mark.parametrize(
    ("message", "rcode"),
    [
        (struct.pack("!6H", 7, 0x2000, 1, 0, 0, 0) + NAME + b"\0\1\0\1", 4),
        (struct.pack("!6H", 7, 0x0100, 0, 0, 0, 0), 1),
        (struct.pack("!6H", 7, 0x0100, 2, 0, 0, 0) + NAME + b"\0\1\0\1" + NAME + b"\0\1\0\1", 1),
        (struct.pack("!6H", 7, 0x0100, 1, 1, 0, 0) + NAME + b"\0\1\0\1" + A_RECORD, 1),
        (HEAD + NAME + b"\0\1\0\3", 1),
        (HEAD + NAME + b"\0\1\0\xff", 1),
        (HEAD + NAME + b"\0\1\0", 1),
        (HEAD + b"\1a\xc0\x0c\0\1\0\1", 1),
        (HEAD + b"\x40" + b"a" * 64 + b"\0\0\1\0\1", 1),
        (HEAD + b"\5ab", 1),
        (HEAD + NAME + b"\0\1\0\1trailing", 1),
        (struct.pack("!6H", 7, 0, 1, 0, 0, 2) + NAME + b"\0\1\0\1" + OPT + OPT, 1),
        (struct.pack("!6H", 7, 0, 1, 0, 0, 1) + NAME + b"\0\1\0\1" + b"\1x" + OPT, 1),
        (struct.pack("!6H", 7, 0, 1, 0, 0, 1) + NAME + b"\0\1\0\1" + OPT[:-1], 1),
        (struct.pack("!6H", 7, 0, 1, 0, 0, 5) + NAME + b"\0\1\0\1" + OPT * 5, 1),
        (
            struct.pack("!6H", 7, 0, 1, 0, 0, 1) + NAME + b"\0\1\0\1" + b"\0" + struct.pack("!HHIH", 41, 9, 1 << 16, 0),
            16,
        ),
    ],
)
def test_what_is_no_question(wire: Any, message: bytes, rcode: int) -> None:
    """Each kind of wrong message has its code, and its reply is a message again."""
    query = wire.parse_query(message)
    assert query.rcode == rcode
    reply = dns.message.from_wire(wire.build_reply(query, rcode, b"", 0, 0, (), 0, b"", 512))
    assert reply.id == 7
    assert reply.rcode() == rcode


@pytest.mark.parametrize("message", [b"", b"\0" * 11, struct.pack("!6H", 1, 0x8000, 1, 0, 0, 0)])
def test_what_gets_no_reply(wire: Any, message: bytes) -> None:
    """Too short for a header, or a reply itself: silence, or two servers would talk for ever."""
    assert wire.parse_query(message) is None


def test_reply(wire: Any) -> None:
    """dnspython reads the reply: the question as spelled, flags of contract 8.1, TTL capped, option."""
    query = wire.parse_query(make(use_edns=0, want_dnssec=True, flags=dns.flags.RD | dns.flags.CD | dns.flags.AD))
    reply = dns.message.from_wire(wire.build_reply(query, 3, A_RECORD, 1, 0, (6,), 5, EDE, 1232))
    assert reply.flags & 0xFFF0 == dns.flags.QR | dns.flags.RD | dns.flags.RA | dns.flags.CD
    assert reply.question[0].name.to_text() == "Api.Example.com."
    assert reply.rcode() == 3
    assert reply.answer[0].ttl == 300
    assert reply.answer[0][0].address == "192.0.2.1"
    assert (reply.payload, reply.ednsflags) == (1232, 0)
    assert isinstance(reply.options[0], dns.edns.EDEOption)
    assert (reply.options[0].code, reply.options[0].text) == (15, "no")


@pytest.mark.parametrize(("age", "left"), [(0, 300), (300, 300), (400, 200), (600, 0), (10**9, 0)])
def test_ttl_is_what_is_left(wire: Any, age: int, left: int) -> None:
    """A record keeps its received TTL minus its age, within 0 and 300."""
    query = wire.parse_query(make())
    reply = dns.message.from_wire(wire.build_reply(query, 0, A_RECORD, 1, 0, (6,), age, b"", 512))
    assert reply.answer[0].ttl == left


def test_too_long_is_truncated(wire: Any) -> None:
    """What does not fit leaves as question, TC and OPT only."""
    query = wire.parse_query(make(use_edns=0))
    reply = wire.build_reply(query, 0, A_RECORD * 40, 40, 0, (6,), 0, EDE, 512)
    message = dns.message.from_wire(reply)
    assert message.flags & dns.flags.TC
    assert not message.answer
    assert message.options
    assert wire.build_reply(query, 0, b"", 0, 0, (), 0, b"x" * 600, 512)[2] & 2


@pytest.mark.parametrize(
    ("additional", "rcode"),
    [
        (A_RECORD, 0),
        (b"\1x\0" + A_RECORD[2:], 0),
        (b"\xc0", 1),
        (b"\x40" + A_RECORD[2:], 1),
        (b"\5ab", 1),
        (b"\0" + A_RECORD[2:-2], 1),
    ],
    ids=["pointer", "labels", "half a pointer", "reserved label", "no end", "short data"],
)
def test_other_records_beside_the_question_are_passed_over(wire: Any, additional: bytes, rcode: int) -> None:
    """A whole record of any owner is no fault, and one that ends too early is."""
    plain = make()
    query = wire.parse_query(plain[:10] + b"\0\1" + plain[12:] + additional)
    assert (query.rcode, query.edns) == (rcode, False)


def test_only_octets_are_a_message(wire: Any) -> None:
    """Text is a mistake of ours, not a question."""
    with pytest.raises(TypeError, match="bytes"):
        wire.parse_query("text")


@pytest.mark.parametrize("offset", [-1, 13, 1 << 40])
def test_offset_outside_is_refused(wire: Any, offset: int) -> None:
    """A TTL offset outside the records raises ValueError and writes nowhere."""
    with pytest.raises(ValueError, match="outside"):
        wire.build_reply(wire.parse_query(make()), 0, A_RECORD, 1, 0, (offset,), 0, b"", 512)


MESSAGES = st.builds(
    lambda flags, counts, rest: struct.pack("!6H", 9, flags, *counts) + rest,
    st.sampled_from([0, 0x100, 0x120, 0x2800, 0x8180]),
    st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1), st.integers(0, 5)),
    st.one_of(
        st.binary(max_size=60), st.sampled_from([NAME + b"\0\1\0\1", b"\3A.b\0\0\x1c\0\1" + OPT, b"\0\0\2\0\1" + OPT])
    ),
)


@given(st.one_of(MESSAGES, st.binary(max_size=400)))
@example(HEAD + b"\1\xff\0\0\1\0\2")
def test_twins_agree_on_any_octets(message: bytes) -> None:
    """Whatever arrives, both read the same, never fail, and the refusal they write is the same."""
    one, other = fast.parse_query(message), pure.parse_query(message)
    assert (one is None) == (other is None)
    if one is None or other is None:
        return
    assert [getattr(one, field) for field in FIELDS] == [getattr(other, field) for field in FIELDS]
    for limit in (12, 64, 512):
        arguments = (one.rcode or 3, A_RECORD, 1, 0, (6,), 10, EDE, limit)
        assert fast.build_reply(one, *arguments) == pure.build_reply(other, *arguments)
