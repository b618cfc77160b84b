"""
The answer that nearly every question gets, read and written without dnspython: addresses, behind aliases or not.

Whatever is not exactly that, another type or class, an extended code, a name or a record that does not end, is
dnspython's to judge, which takes ten times as long. No I/O.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from clawker_cp.dns.addresses import AddressFilter, kernel_form

HEADER = 12
CNAME, OPT = 5, 41
CLASS_IN = 1
ADDRESS_BYTES = {1: 4, 28: 16}  # by type: A, AAAA
MAX_NAME = 255
MAX_POINTERS = 16  # in one name, as for dnspython: a chain of thousands would hold the loop
MAX_TTL = 2**31 - 1  # RFC 2181, 8
POINTER = 0xC000

_FIXED = struct.Struct("!HHIH")
_COUNTS = struct.Struct("!4H")
_TWO = struct.Struct("!H")


class Shape:
    """
    One answer as octets: `body` stands right after the question.

    `rows` are (kernel form, address, received TTL); `refused`: there were addresses and none may be answered.
    """

    __slots__ = ("addresses", "answers", "authority", "body", "refused", "rows", "ttl_offsets")

    def __init__(
        self,
        body: bytes,
        answers: int,
        authority: int,
        ttl_offsets: tuple[int, ...],
        rows: tuple[tuple[bytes, int], ...],
        addresses: tuple[bytes, ...],
        refused: bool,
    ) -> None:
        self.body = body
        self.answers = answers
        self.authority = authority
        self.ttl_offsets = ttl_offsets
        self.rows = rows
        self.addresses = addresses
        self.refused = refused


class Record(NamedTuple):
    """One record; `owner` and an alias's `data` are names in wire form, not compressed, in the case they came in."""

    owner: bytes
    kind: int
    ttl: int
    data: bytes


class AddressAnswer:
    """
    Records of the asked address type, at least one, and aliases; records of one set have the set's least TTL.
    """

    __slots__ = ("_records",)

    def __init__(self, records: tuple[Record, ...]) -> None:
        self._records = records

    @property
    def ttl(self) -> int:
        """The least of all, in seconds."""
        return min(record.ttl for record in self._records)

    def write(self, question: bytes, admits: AddressFilter, *, private: bool) -> tuple[Shape, bool]:
        """
        Write what an agent may have of it, after `question`; True = nothing was left out.
        """
        body = bytearray()
        known: dict[bytes, int] = {}
        _remember(question[:-4].lower(), HEADER, len(question) - 5, known)
        start = HEADER + len(question)
        offsets, rows, addresses, dropped = [], [], [], False
        for owner, kind, ttl, data in self._records:
            if kind != CNAME:
                if not admits.admits(data, private=private):
                    dropped = True
                    continue
                addresses.append(data)
                rows.append((kernel_form(data), ttl))
            _put_name(body, owner, start, known)
            offsets.append(len(body) + 4)
            body += _FIXED.pack(kind, CLASS_IN, ttl, len(data))
            if kind == CNAME:
                begin = len(body)
                _put_name(body, data, start, known)
                _TWO.pack_into(body, begin - 2, len(body) - begin)
            else:
                body += data
        shape = Shape(
            bytes(body), len(offsets), 0, tuple(offsets), tuple(rows), tuple(addresses), refused=not addresses
        )
        return shape, not dropped


def read_addresses(message: bytes, question: bytes) -> AddressAnswer | None:
    """
    Read the answer to `question` (name, type and class in wire form), None if it is of another kind than this.

    Sections that nobody is shown are walked through, not read.
    """
    (asked,) = _TWO.unpack_from(question, len(question) - 4)
    size = ADDRESS_BYTES.get(asked)
    at = HEADER + len(question)
    if size is None or message[3] & 15 or message[HEADER:at].lower() != question.lower():
        return None
    questions, answers, authority, additional = _COUNTS.unpack_from(message, 4)
    if questions != 1:
        return None
    try:
        records, at = _answers(message, at, answers, asked, size)
        for _ in range(authority + additional):
            _, at = _name(message, at)
            kind, _, extended, length = _FIXED.unpack_from(message, at)
            at += _FIXED.size + length
            if at > len(message) or (kind == OPT and extended >> 24):
                return None
    except (IndexError, ValueError, struct.error):
        return None
    return AddressAnswer(records) if any(record.kind != CNAME for record in records) else None


def _answers(message: bytes, at: int, count: int, asked: int, size: int) -> tuple[tuple[Record, ...], int]:
    """Read the answer section; returns where it ends. Raises ValueError for what is not to be read here."""
    found: dict[tuple[bytes, int, bytes], Record] = {}
    least: dict[tuple[bytes, int], int] = {}
    for _ in range(count):
        owner, at = _name(message, at)
        kind, of_class, ttl, length = _FIXED.unpack_from(message, at)
        at += _FIXED.size
        end = at + length
        lowered = owner.lower()
        if of_class != CLASS_IN or ttl > MAX_TTL or end > len(message):
            raise ValueError
        if kind == asked and length == size:
            data = message[at:end]
        elif kind == CNAME and (lowered, CNAME) not in least:
            data, at = _name(message, at)
            if at != end:
                raise ValueError
        else:
            raise ValueError
        at = end
        found.setdefault((lowered, kind, data), Record(owner, kind, ttl, data))
        least[lowered, kind] = min(ttl, least.get((lowered, kind), ttl))
    return tuple(one._replace(ttl=least[lowered, kind]) for (lowered, kind, _), one in found.items()), at


def _name(message: bytes, at: int) -> tuple[bytes, int]:
    """Read a name; returns it without compression, and where it ends. Raises IndexError or ValueError."""
    name, end, before, pointers = b"", 0, at, 0
    while True:
        octet = message[at]
        if octet >= 192:
            end = end or at + 2
            at = (octet & 63) << 8 | message[at + 1]
            pointers += 1
            # Each pointer leads to before the last.
            if not HEADER <= at < before or pointers > MAX_POINTERS:
                raise ValueError
            before = at
            continue
        if octet > 63:
            raise ValueError
        name += message[at : at + octet + 1]
        at += octet + 1
        if len(name) > MAX_NAME:
            raise ValueError
        if not octet:
            return name, end or at


def _put_name(body: bytearray, name: bytes, start: int, known: dict[bytes, int]) -> None:
    """Append a name, its end as a pointer if that stands in the message already."""
    lowered, at, begin = name.lower(), 0, start + len(body)
    while name[at] and lowered[at:] not in known:
        at += name[at] + 1
    body += name[:at]
    body += _TWO.pack(POINTER | known[lowered[at:]]) if name[at] else b"\0"
    _remember(lowered, begin, at, known)


def _remember(lowered: bytes, begin: int, until: int, known: dict[bytes, int]) -> None:
    """Note where the ends of a name stand that begin before `until`; a pointer has 14 bits."""
    at = 0
    while at < until and begin + at < 1 << 14:
        known[lowered[at:]] = begin + at
        at += lowered[at] + 1
