# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""
Longest match of DNS names over exact names and wildcard bases, compiled.

Twin of `_pure/names.py`, which states the contract; chosen by `accel.py`. One pass from the
right end: the hash of every suffix that starts at a label is a prefix of one running hash.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc
from cpython.unicode cimport PyUnicode_GET_LENGTH, PyUnicode_1BYTE_DATA
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef enum:
    MAX_NAME = 253

cdef extern from "Python.h":
    int PyUnicode_IS_ASCII(object text)

cdef struct Slot:
    uint64_t hash
    uint32_t start
    uint32_t length     # 0 = free: the empty name is never stored
    int64_t value

cdef struct Table:
    Slot *slots
    uint64_t mask
    char *text


cdef inline uint64_t _mix(uint64_t running, unsigned char octet) noexcept nogil:
    return (running ^ octet) * <uint64_t>0x100000001B3


cdef inline unsigned char _lower(unsigned char octet) noexcept nogil:
    return octet + 32 if 65 <= octet <= 90 else octet


cdef inline uint64_t _spread(uint64_t hash) noexcept nogil:
    # The multiplication leaves the low bits weak, and the low bits choose the slot.
    return hash ^ (hash >> 29)


cdef int64_t _find(Table *table, const char *text, uint32_t length, uint64_t hash) noexcept nogil:
    cdef uint64_t position = _spread(hash) & table.mask
    cdef Slot *slot
    while True:
        slot = &table.slots[position]
        if slot.length == 0:
            return -1
        if slot.hash == hash and slot.length == length and memcmp(table.text + slot.start, text, length) == 0:
            return slot.value
        position = (position + 1) & table.mask


cdef int _fill(Table *table, object entries) except -1:
    """Build the table from normalised (bytes, int) pairs; twice as many slots as entries keeps chains short."""
    cdef uint64_t size = 8, position, hash, seed = <uint64_t>0xCBF29CE484222325
    cdef uint32_t total = 0, length, index
    cdef Slot *slot
    cdef bytes name
    cdef const char *source
    while size < <uint64_t>(2 * len(entries)):
        size <<= 1
    for name in entries:
        total += <uint32_t>len(name)
    table.slots = <Slot *>PyMem_Calloc(size, sizeof(Slot))
    table.text = <char *>PyMem_Malloc(total + 1)
    if table.slots == NULL or table.text == NULL:
        raise MemoryError
    table.mask = size - 1
    total = 0
    for name, value in entries.items():
        length = <uint32_t>len(name)
        source = PyBytes_AS_STRING(name)
        hash = seed
        for index in range(length):
            hash = _mix(hash, <unsigned char>source[length - 1 - index])
        position = _spread(hash) & table.mask
        while table.slots[position].length != 0:
            position = (position + 1) & table.mask
        slot = &table.slots[position]
        slot.hash, slot.start, slot.length, slot.value = hash, total, length, value
        memcpy(table.text + total, source, length)
        total += length
    return 0


cdef dict _normalised(object names):
    cdef dict result = {}
    for name, value in names.items():
        if value < 0:
            raise ValueError(f"value of {name!r} is {value}: must not be negative, -1 means no match")
        key = (name.encode("ascii") if isinstance(name, str) else bytes(name)).strip(b".").lower()
        if len(key) > MAX_NAME:
            raise ValueError(f"name {name!r} is longer than {MAX_NAME} characters")
        result[key] = value
    return result


cdef class NameMatcher:
    """Match a name against exact names, then against the longest wildcard base."""

    cdef Table _exact
    cdef Table _below
    cdef int64_t _everything
    cdef readonly Py_ssize_t size

    def __cinit__(self, exact, wildcard):
        cdef dict names = _normalised(exact)
        cdef dict bases = _normalised(wildcard)
        names.pop(b"", None)
        self._everything = bases.pop(b"", -1)
        self.size = len(names) + len(bases)
        _fill(&self._exact, names)
        _fill(&self._below, bases)

    def __dealloc__(self):
        PyMem_Free(self._exact.slots)
        PyMem_Free(self._exact.text)
        PyMem_Free(self._below.slots)
        PyMem_Free(self._below.text)

    def __len__(self):
        return self.size

    def match(self, name):
        """Return the value of the exact entry, else of the longest base at or above the name, else -1."""
        cdef const unsigned char *text
        cdef Py_ssize_t length
        if type(name) is str:
            if not PyUnicode_IS_ASCII(name):
                return -1
            text = <const unsigned char *>PyUnicode_1BYTE_DATA(name)
            length = PyUnicode_GET_LENGTH(name)
        elif type(name) is bytes:
            text = <const unsigned char *>PyBytes_AS_STRING(name)
            length = PyBytes_GET_SIZE(name)
        else:
            raise TypeError(f"name must be str or bytes, not {type(name).__name__}")
        return self._match(text, length)

    cdef int64_t _match(self, const unsigned char *text, Py_ssize_t length) noexcept:
        cdef char lowered[MAX_NAME]
        cdef uint64_t hash = <uint64_t>0xCBF29CE484222325
        cdef int64_t best = self._everything, found
        cdef Py_ssize_t position
        cdef unsigned char octet
        if length and text[length - 1] == 46:
            length -= 1
        if length == 0 or length > MAX_NAME:
            return -1
        for position in range(length - 1, -1, -1):
            octet = _lower(text[position])
            if octet == 46 and position + 1 < length:
                found = _find(&self._below, lowered + position + 1, <uint32_t>(length - position - 1), hash)
                if found >= 0:
                    best = found
            lowered[position] = <char>octet
            hash = _mix(hash, octet)
        found = _find(&self._exact, lowered, <uint32_t>length, hash)
        if found >= 0:
            return found
        found = _find(&self._below, lowered, <uint32_t>length, hash)
        return found if found >= 0 else best
