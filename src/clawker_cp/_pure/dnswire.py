"""
Read DNS questions and write replies, in plain Python; records of other servers are not its job.

Twin of `_fast/dnswire.pyx`; chosen by `accel.py`. Only the gate uses it.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct("!6H")
TYPE_OPT = 41
CLASS_IN = 1
FORMERR = 1
NOTIMP = 4
BADVERS = 16
EDNS_SIZE = 1232
PLAIN_SIZE = 512
MAX_TTL = 300
MAX_WIRE_NAME = 255
MAX_ADDITIONAL = 4

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


class Query:
    """
    One question as it came.

    `rcode` other than 0 is the only right reply (FORMERR, NOTIMP, BADVERS) and, BADVERS apart, the
    rest is empty then. `name` is lower case without a dot at its end, every octet but letters,
    digits, `-` and `_` as `\\DDD` (`odd` is True then): a dot in it is always a border of labels.
    `question` is the wire question as sent, `key` name and type of it in lower case. `size` is the
    longest UDP reply the client takes, between 512 and 1,232 octets.
    """

    __slots__ = ("edns", "flags", "id", "key", "name", "odd", "qtype", "question", "rcode", "size")

    def __init__(self, number: int, flags: int) -> None:
        self.id = number
        self.flags = flags
        self.rcode = FORMERR
        self.qtype = 0
        self.size = PLAIN_SIZE
        self.edns = False
        self.odd = False
        self.name = ""
        self.question = b""
        self.key = b""


def parse_query(data: bytes) -> Query | None:
    """Read one question; None if the message must not be answered (too short, or itself a reply)."""
    if not isinstance(data, bytes):
        raise TypeError(f"data must be bytes, not {type(data).__name__}")
    if len(data) < HEADER.size or data[2] & 0x80:
        return None
    number, flags, questions, answers, authority, additional = HEADER.unpack_from(data)
    query = Query(number, flags)
    if flags & 0x7800:
        query.rcode = NOTIMP
        return query
    if questions != 1 or answers or authority or additional > MAX_ADDITIONAL:
        return query
    labels: list[bytes] = []
    at = HEADER.size
    used = 0
    while True:
        # No pointer can stand in the first name: there is nothing before it to point at.
        left = data[at] if at < len(data) else 64
        if left > 63 or used + left + 1 > MAX_WIRE_NAME or at + left + 1 > len(data):
            return query
        used += left + 1
        at += left + 1
        if left == 0:
            break
        labels.append(data[at - left : at].lower())
    if at + 4 > len(data):
        return query
    qtype, qclass = struct.unpack_from("!2H", data, at)
    if qclass != CLASS_IN:
        return query
    at += 4
    rcode = _additional(query, data, at, additional)
    if rcode == FORMERR:
        query.edns = False
        query.size = PLAIN_SIZE
        return query
    query.rcode = rcode
    query.qtype = qtype
    texts = [_text(label) for label in labels]
    query.name = ".".join(texts)
    query.odd = "\\" in query.name
    query.question = data[HEADER.size : at]
    query.key = b"".join(bytes((len(label),)) + label for label in labels) + b"\0" + data[at - 4 : at - 2]
    return query


def _text(label: bytes) -> str:
    return "".join(chr(octet) if octet in _PLAIN else f"\\{octet:03d}" for octet in label)


def _skip_name(data: bytes, at: int) -> int:
    """Return the offset after a name that may be compressed, -1 if it does not end."""
    while at < len(data):
        octet = data[at]
        if octet == 0:
            return at + 1
        if octet >= 192:
            return at + 2 if at + 2 <= len(data) else -1
        if octet > 63:
            return -1
        at += octet + 1
    return -1


def _additional(query: Query, data: bytes, at: int, count: int) -> int:
    """Look for the one OPT record; return 0, FORMERR or BADVERS."""
    version = 0
    for _ in range(count):
        after = _skip_name(data, at)
        if after < 0 or after + 10 > len(data):
            return FORMERR
        kind, size, _, version_now, _, rdlength = struct.unpack_from("!HHBBHH", data, after)
        if after + 10 + rdlength > len(data):
            return FORMERR
        if kind == TYPE_OPT:
            if query.edns or after != at + 1:
                return FORMERR
            query.edns = True
            query.size = min(max(size, PLAIN_SIZE), EDNS_SIZE)
            version = version_now
        at = after + 10 + rdlength
    if at != len(data):
        return FORMERR
    return BADVERS if version else 0


def build_reply(
    query: Query,
    rcode: int,
    body: bytes,
    answers: int,
    authority: int,
    ttl_offsets: tuple[int, ...],
    age_s: int,
    option: bytes,
    limit: int,
) -> bytes:
    """
    Write one reply: RA, never AA or AD; RD and CD as asked.

    `body` holds the `answers` and `authority` records, made to stand right after this question.
    `ttl_offsets` are where in it the TTLs are as received: each becomes what is left after
    `age_s` seconds, at most 300. `option` (EDNS options) goes out only if the question had OPT.
    Longer than `limit` octets: truncated, no records.
    """
    opt = 11 if query.edns else 0
    if not opt:
        option = b""
    question = query.question
    flags = 0x8080 | (query.flags & 0x7910) | (rcode & 15)
    if HEADER.size + len(question) + len(body) + opt + len(option) > limit:
        flags |= 0x0200
        body, answers, authority = b"", 0, 0
        if HEADER.size + len(question) + opt + len(option) > limit:
            option = b""
    if body and ttl_offsets:
        patched = bytearray(body)
        for offset in ttl_offsets:
            if offset < 0 or offset + 4 > len(patched):
                raise ValueError(f"TTL offset {offset} is outside the body of {len(patched)} bytes")
            (ttl,) = struct.unpack_from("!I", patched, offset)
            struct.pack_into("!I", patched, offset, min(max(ttl - age_s, 0), MAX_TTL))
        body = bytes(patched)
    header = HEADER.pack(query.id, flags, 1 if question else 0, answers, authority, 1 if opt else 0)
    if not opt:
        return header + question + body
    trailer = struct.pack("!BHHBBHH", 0, TYPE_OPT, EDNS_SIZE, rcode >> 4, 0, 0, len(option))
    return header + question + body + trailer + option
