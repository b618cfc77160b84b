# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""
Read DNS questions and write replies, compiled; records of other servers are not its job.

Twin of `_pure/dnswire.py`, which states the contract; chosen by `accel.py`. Every read is bounded
by the length of the message, every write by the buffer on the stack or the bytes object made for it.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy

cdef enum:
    HEADER = 12
    MAX_WIRE_NAME = 255
    MAX_ADDITIONAL = 4
    TYPE_OPT = 41
    CLASS_IN = 1
    FORMERR = 1
    NOTIMP = 4
    BADVERS = 16
    EDNS_SIZE = 1232
    PLAIN_SIZE = 512
    MAX_TTL = 300
    LONGEST_TEXT = 4 * 255


@cython.freelist(64)
cdef class Query:
    """One question as it came; see the plain twin."""

    cdef readonly int id
    cdef readonly int flags
    cdef readonly int rcode
    cdef readonly int qtype
    cdef readonly int size
    cdef readonly bint edns
    cdef readonly bint odd
    cdef readonly str name
    cdef readonly bytes question
    cdef readonly bytes key


cdef inline int _two(const unsigned char *at) noexcept nogil:
    return (at[0] << 8) | at[1]


cdef Py_ssize_t _skip_name(const unsigned char *data, Py_ssize_t at, Py_ssize_t length) noexcept nogil:
    """Return the offset after a name that may be compressed, -1 if it does not end."""
    cdef int octet
    while at < length:
        octet = data[at]
        if octet == 0:
            return at + 1
        if octet >= 192:
            return at + 2 if at + 2 <= length else -1
        if octet > 63:
            return -1
        at += octet + 1
    return -1


cdef int _additional(Query query, const unsigned char *data, Py_ssize_t at, Py_ssize_t length, int count) noexcept:
    """Look for the one OPT record; return 0, FORMERR or BADVERS."""
    cdef int kind, version = 0
    cdef Py_ssize_t after, rdlength
    for _ in range(count):
        after = _skip_name(data, at, length)
        if after < 0 or after + 10 > length:
            return FORMERR
        kind = _two(data + after)
        rdlength = _two(data + after + 8)
        if after + 10 + rdlength > length:
            return FORMERR
        if kind == TYPE_OPT:
            if query.edns or after != at + 1:
                return FORMERR
            query.edns = True
            query.size = min(max(_two(data + after + 2), PLAIN_SIZE), EDNS_SIZE)
            version = data[after + 5]
        at = after + 10 + rdlength
    if at != length:
        return FORMERR
    return BADVERS if version else 0


def parse_query(bytes data not None):
    """Read one question; None if the message must not be answered. See the plain twin."""
    cdef const unsigned char *raw = <const unsigned char *>PyBytes_AS_STRING(data)
    cdef Py_ssize_t length = PyBytes_GET_SIZE(data), at = HEADER
    cdef unsigned char lowered[MAX_WIRE_NAME + 3]
    cdef char text[LONGEST_TEXT + 4]
    cdef int octet, left, used = 0, written = 0, rcode
    cdef bint odd = False
    cdef Query query
    if length < HEADER or raw[2] & 0x80:
        return None
    query = Query.__new__(Query)
    query.id = _two(raw)
    query.flags = _two(raw + 2)
    query.size = PLAIN_SIZE
    query.name = ""
    query.question = query.key = b""
    if raw[2] & 0x78:
        query.rcode = NOTIMP
        return query
    query.rcode = FORMERR
    if _two(raw + 4) != 1 or _two(raw + 6) or _two(raw + 8) or _two(raw + 10) > MAX_ADDITIONAL:
        return query
    while True:
        if at >= length:
            return query
        left = raw[at]
        # No pointer can stand in the first name: there is nothing before it to point at.
        if left > 63 or used + left + 1 > MAX_WIRE_NAME or at + left + 1 > length:
            return query
        lowered[used] = <unsigned char>left
        used += 1
        at += 1
        if left == 0:
            break
        if written:
            text[written] = 46
            written += 1
        for _ in range(left):
            octet = raw[at]
            if 65 <= octet <= 90:
                octet += 32
            lowered[used] = <unsigned char>octet
            if 97 <= octet <= 122 or 48 <= octet <= 57 or octet == 45 or octet == 95:
                text[written] = <char>octet
                written += 1
            else:
                odd = True
                text[written] = 92
                text[written + 1] = <char>(48 + octet // 100)
                text[written + 2] = <char>(48 + octet // 10 % 10)
                text[written + 3] = <char>(48 + octet % 10)
                written += 4
            used += 1
            at += 1
    if at + 4 > length or _two(raw + at + 2) != CLASS_IN:
        return query
    lowered[used] = raw[at]
    lowered[used + 1] = raw[at + 1]
    at += 4
    rcode = _additional(query, raw, at, length, _two(raw + 10))
    if rcode == FORMERR:
        query.edns = False
        query.size = PLAIN_SIZE
        return query
    query.rcode = rcode
    query.qtype = _two(raw + at - 4)
    query.odd = odd
    query.name = PyUnicode_DecodeASCII(text, written, NULL)
    query.question = PyBytes_FromStringAndSize(<const char *>raw + HEADER, at - HEADER)
    query.key = PyBytes_FromStringAndSize(<const char *>lowered, used + 2)
    return query


cdef inline void _put_two(unsigned char *at, int value) noexcept nogil:
    at[0] = <unsigned char>(value >> 8)
    at[1] = <unsigned char>value


def build_reply(Query query not None, int rcode, bytes body not None, int answers, int authority,
                tuple ttl_offsets not None, int64_t age_s, bytes option not None, int limit):
    """Write one reply; see the plain twin."""
    cdef Py_ssize_t question = PyBytes_GET_SIZE(query.question), size = PyBytes_GET_SIZE(body)
    cdef Py_ssize_t extra = PyBytes_GET_SIZE(option), offset
    cdef int opt = 11 if query.edns else 0, flags
    cdef int64_t ttl
    cdef bytes reply
    cdef unsigned char *out
    cdef unsigned char *at
    if not opt:
        extra = 0
    flags = 0x8080 | (query.flags & 0x7910) | (rcode & 15)
    if HEADER + question + size + opt + extra > limit:
        flags |= 0x0200
        size = answers = authority = 0
        if HEADER + question + opt + extra > limit:
            extra = 0
    reply = PyBytes_FromStringAndSize(NULL, HEADER + question + size + opt + extra)
    out = <unsigned char *>PyBytes_AS_STRING(reply)
    _put_two(out, query.id)
    _put_two(out + 2, flags)
    _put_two(out + 4, 1 if question else 0)
    _put_two(out + 6, answers)
    _put_two(out + 8, authority)
    _put_two(out + 10, 1 if opt else 0)
    memcpy(out + HEADER, PyBytes_AS_STRING(query.question), question)
    at = out + HEADER + question
    memcpy(at, PyBytes_AS_STRING(body), size)
    if size:
        for position in ttl_offsets:
            offset = position
            if offset < 0 or offset + 4 > size:
                raise ValueError(f"TTL offset {offset} is outside the body of {size} bytes")
            ttl = (<int64_t>_two(at + offset) << 16) | _two(at + offset + 2)
            ttl = min(max(ttl - age_s, 0), MAX_TTL)
            _put_two(at + offset, 0)
            _put_two(at + offset + 2, <int>ttl)
    if opt:
        at += size
        at[0] = 0
        _put_two(at + 1, TYPE_OPT)
        _put_two(at + 3, EDNS_SIZE)
        at[5] = <unsigned char>(rcode >> 4)
        at[6] = at[7] = at[8] = 0
        _put_two(at + 9, <int>extra)
        memcpy(at + 11, PyBytes_AS_STRING(option), extra)
    return reply
