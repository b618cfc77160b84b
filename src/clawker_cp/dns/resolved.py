"""
What a forwarder said, reduced to what agents may see, and the cache of it.

Parsing and re-writing of records is dnspython's, but for plain addresses; one answer is written once per kind of
client (private addresses or not) and then only copied. No I/O.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rdtypes.svcbbase
import dns.rrset

from clawker_cp.dns.address_answer import HEADER, AddressAnswer, Shape, read_addresses
from clawker_cp.dns.addresses import AddressFilter, kernel_form

A, NS, CNAME, SOA, NULL, PTR, MX, TXT, AAAA, SRV, SVCB, HTTPS, ANY, CAA = (
    1,
    2,
    5,
    6,
    10,
    12,
    15,
    16,
    28,
    33,
    64,
    65,
    255,
    257,
)
DNAME = 39
FORWARDED = frozenset({A, NS, CNAME, SOA, PTR, MX, TXT, AAAA, SRV, SVCB, HTTPS, CAA})
NOERROR, SERVFAIL, NXDOMAIN = 0, 2, 3

MAX_NEGATIVE_S = 300
DEFAULT_NEGATIVE_S = 5
MAX_LIFE_S = 86_400
MAX_RECORDS = 512  # reading more would hold the loop for milliseconds, and no agent may have as many rows

# Removed from HTTPS and SVCB: ech would hide the name from the proxy, hints go around the name cache.
_REMOVED_PARAMS = (4, 5, 6)
_MANDATORY = 0


Records = tuple[dns.rrset.RRset, ...] | AddressAnswer


class Resolved:
    """
    What is known about one question; `failed`: no forwarder answered.

    `expires_ns` and `received_ns` are monotonic. `own_zone`: the name lies in a zone with forwarders of its own.
    """

    __slots__ = (
        "_private",
        "_public",
        "expires_ns",
        "failed",
        "own_zone",
        "question",
        "rcode",
        "received_ns",
        "records",
        "size",
        "zone",
    )

    def __init__(
        self,
        question: bytes,
        rcode: int,
        records: Records,
        *,
        received_ns: int,
        life_s: int,
        zone: str = ".",
        own_zone: bool = False,
        failed: bool = False,
        size: int = 0,
    ) -> None:
        self.question = question
        self.rcode = rcode
        self.records = records
        self.received_ns = received_ns
        self.expires_ns = received_ns + life_s * 1_000_000_000
        self.zone = zone
        self.own_zone = own_zone
        self.failed = failed
        self.size = size + 512
        self._public: Shape | None = None
        self._private: Shape | None = None

    def shape(self, admits: AddressFilter, *, private: bool) -> Shape:
        """Return the octets for a client that may (not) have private addresses; made once each."""
        made = self._private if private else self._public
        if made is None:
            if isinstance(self.records, AddressAnswer):
                made, whole = self.records.write(self.question, admits, private=private)
            else:
                made, whole = _write(self.question, self.rcode, self.records, admits, private=private)
            if private:
                self._private = made
            else:
                self._public = made
                if whole:
                    # Who may have more gets the same; the parsed records are the larger part of the memory.
                    self._private = made
                    self.records = ()
        return made


def negative_authority(question: bytes) -> bytes:
    """Return the SOA record of an answer without data: owner = parent of the queried name, TTL 1."""
    first = question[0]
    # The parent stands in the question already; the parent of a top-level name is the root.
    owner = struct.pack("!H", 0xC000 | (HEADER + 1 + first)) if first and question[1 + first] else b"\0"
    return owner + _SOA_REST


_SOA_DATA = b"\x07clawker\0" + b"\x04gate\x07clawker\0" + struct.pack("!5I", 1, 1, 1, 1, 1)
_SOA_REST = struct.pack("!HHIH", SOA, 1, 1, len(_SOA_DATA)) + _SOA_DATA
HINFO_ANY = b"\xc0\x0c" + struct.pack("!HHIH", 13, 1, 300, 9) + b"\x07RFC8482\0"


def read_answer(message: bytes, question: bytes, *, now_ns: int, zone: str = ".", own_zone: bool = False) -> Resolved:
    """
    Reduce a forwarder's message to what may be passed on of its answer section.

    `question` is the name, type and class in wire form. Records of other types than the asked
    and of aliases are dropped. HTTPS and SVCB that cannot be read count as no data; any other
    message that cannot be read raises dns.exception.DNSException or ValueError.
    """
    qtype = struct.unpack_from("!H", question, len(question) - 4)[0]
    if sum(struct.unpack_from("!3H", message, 6)) > MAX_RECORDS:
        raise ValueError(f"more than {MAX_RECORDS} records")
    plain = read_addresses(message, question)
    rcode, life_s, kept = _parsed(message, qtype) if plain is None else (NOERROR, plain.ttl, plain)
    return Resolved(
        question,
        rcode,
        kept,
        received_ns=now_ns,
        life_s=min(max(life_s, 0), MAX_LIFE_S),
        zone=zone,
        own_zone=own_zone,
        size=2 * len(message),
    )


def _parsed(message: bytes, qtype: int) -> tuple[int, int, Records]:
    """Read a message of any kind; returns its code, how long it may be kept, and the records of interest."""
    try:
        parsed = dns.message.from_wire(message, ignore_trailing=True, one_rr_per_rrset=False)
    except (dns.exception.DNSException, ValueError, struct.error):
        if qtype in (HTTPS, SVCB):
            return NOERROR, DEFAULT_NEGATIVE_S, ()
        raise
    rcode = int(parsed.rcode())
    # Another class gives the same type another layout, which would go out as class IN, unfiltered.
    ours = [found for found in parsed.answer if found.rdclass == dns.rdataclass.IN]
    kept = tuple(_presentable(found) for found in ours if found.rdtype in (qtype, CNAME, DNAME))
    life_s = min((int(found.ttl) for found in kept), default=MAX_LIFE_S)
    if rcode != NOERROR or not any(found.rdtype == qtype for found in kept):
        life_s = min(life_s, _negative_s(parsed))
    return rcode, life_s, kept


def _negative_s(parsed: dns.message.Message) -> int:
    for found in parsed.authority:
        if found.rdtype == SOA and len(found):
            return int(min(found.ttl, found[0].minimum, MAX_NEGATIVE_S))
    return DEFAULT_NEGATIVE_S


def _presentable(found: dns.rrset.RRset) -> dns.rrset.RRset:
    """Return HTTPS and SVCB records without the removed parameters, anything else as it is."""
    if found.rdtype not in (HTTPS, SVCB):
        return found
    reduced = dns.rrset.RRset(found.name, found.rdclass, found.rdtype)
    reduced.ttl = found.ttl
    for rdata in found:
        reduced.add(_without_hints(rdata), found.ttl)
    return reduced


def _without_hints(rdata: dns.rdata.Rdata) -> dns.rdata.Rdata:
    assert isinstance(rdata, dns.rdtypes.svcbbase.SVCBBase)
    params = {key: value for key, value in rdata.params.items() if key not in _REMOVED_PARAMS}
    mandatory = params.get(_MANDATORY)
    if isinstance(mandatory, dns.rdtypes.svcbbase.MandatoryParam):
        # A mandatory list that names a missing parameter makes the record unusable.
        left = [key for key in mandatory.keys if key not in _REMOVED_PARAMS]
        if left:
            params[_MANDATORY] = dns.rdtypes.svcbbase.MandatoryParam(left)  # type: ignore[no-untyped-call]
        else:
            del params[_MANDATORY]
    return rdata.replace(params=params)


def _single(found: dns.rrset.RRset) -> Iterator[tuple[dns.rdata.Rdata, bytes]]:
    for rdata in found:
        yield rdata, rdata.to_wire() if found.rdtype in (A, AAAA) else b""


def _write(
    question: bytes, rcode: int, records: tuple[dns.rrset.RRset, ...], admits: AddressFilter, *, private: bool
) -> tuple[Shape, bool]:
    """Write the records an agent may have; True = none was dropped."""
    start = HEADER + len(question)
    name, _ = dns.name.from_wire(question, 0)
    buffer = io.BytesIO()
    # Offsets of compression count from the start of the message, so the file begins where that does.
    buffer.write(bytes(HEADER))
    compress: dict[dns.name.Name, int] = {}
    name.to_wire(buffer, compress)
    buffer.write(question[-4:])
    qtype = struct.unpack_from("!H", question, len(question) - 4)[0]
    offsets: list[int] = []
    rows: list[tuple[bytes, int]] = []
    addresses: list[bytes] = []
    seen = answers = data = 0
    for found in records:
        for rdata, packed in _single(found):
            if packed:
                seen += 1
                if not admits.admits(packed, private=private):
                    continue
                addresses.append(packed)
                rows.append((kernel_form(packed), int(found.ttl)))
            data += found.rdtype == qtype
            answers += 1
            found.name.to_wire(buffer, compress)
            buffer.write(struct.pack("!HH", found.rdtype, 1))
            offsets.append(buffer.tell() - start)
            buffer.write(struct.pack("!IH", found.ttl, 0))
            begin = buffer.tell()
            rdata.to_wire(buffer, compress)
            end = buffer.tell()
            buffer.seek(begin - 2)
            buffer.write(struct.pack("!H", end - begin))
            buffer.seek(end)
    body = buffer.getvalue()[start:]
    authority = 0
    if rcode != NOERROR or not data:
        body += negative_authority(question)
        authority = 1
    refused = seen > 0 and not addresses
    shape = Shape(body, answers, authority, tuple(offsets), tuple(rows), tuple(addresses), refused)
    return shape, seen == len(addresses)


class AnswerCache:
    """
    Answers by question, as long as their TTL says; when full the oldest go first.

    Bounded by number and by octets. Not a cachetools cache: the look-up is on the path of every
    question and has to be one dictionary access.
    """

    def __init__(self, *, entries: int, size_bytes: int) -> None:
        self._limit = entries
        self._limit_bytes = size_bytes
        self._entries: dict[bytes, Resolved] = {}
        self.size_bytes = 0
        self.get = self._entries.get  # may return an answer that has expired: the caller looks

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: bytes, answer: Resolved) -> None:
        """Keep an answer, in place of an older one; drops others if there is no room."""
        self.discard(key)
        if answer.size > self._limit_bytes or self._limit <= 0:
            return
        while len(self._entries) >= self._limit or self.size_bytes + answer.size > self._limit_bytes:
            self.discard(next(iter(self._entries)))
        self._entries[key] = answer
        self.size_bytes += answer.size

    def discard(self, key: bytes) -> None:
        """Drop one answer if it is there."""
        old = self._entries.pop(key, None)
        if old is not None:
            self.size_bytes -= old.size

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self.size_bytes = 0
