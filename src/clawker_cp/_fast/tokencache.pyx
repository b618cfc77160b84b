# cython: language_level=3, auto_pickle=False
"""
What introspection said of a token, for a few seconds, compiled. Never holds a token.

Twin of `_pure/tokencache.py`, which states the contract; chosen by `accel.py`. Used with the GIL held, on
one thread.
"""

from heapq import heapify, heappop, heappush

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.unicode cimport PyUnicode_AsUTF8AndSize

cdef extern from "Python.h":
    PyObject *PyDict_GetItemWithError(dict held, object key) except? NULL

cdef extern from "openssl/evp.h":
    ctypedef struct EVP_MD:
        pass
    ctypedef struct EVP_MD_CTX:
        pass
    ctypedef struct ENGINE:
        pass
    EVP_MD *EVP_MD_fetch(void *library, const char *algorithm, const char *properties)
    EVP_MD_CTX *EVP_MD_CTX_new()
    int EVP_DigestInit_ex(EVP_MD_CTX *state, const EVP_MD *kind, ENGINE *engine)
    int EVP_DigestUpdate(EVP_MD_CTX *state, const void *data, size_t size)
    int EVP_DigestFinal_ex(EVP_MD_CTX *state, unsigned char *digest, unsigned int *size)

# Fetched once: hashlib does that, and copies the state, for every digest, which is a third of its time. One state is
# enough, for nothing gives up the GIL between its beginning and its end; libcrypto cleanses it then.
cdef EVP_MD *SHA256 = EVP_MD_fetch(NULL, "SHA256", NULL)
cdef EVP_MD_CTX *STATE = EVP_MD_CTX_new()
if SHA256 == NULL or STATE == NULL:
    raise ImportError("libcrypto has no SHA-256")

CAPACITY = 4096
NEGATIVE_CAPACITY = 1024
BINDINGS = 4096


cdef bytes _key(bytes certificate, const char *token, Py_ssize_t size):
    cdef bytes digest = PyBytes_FromStringAndSize(NULL, 32)
    if (
        EVP_DigestInit_ex(STATE, SHA256, NULL) != 1
        or EVP_DigestUpdate(STATE, b"\x01", 1) != 1
        or EVP_DigestUpdate(STATE, PyBytes_AS_STRING(certificate), PyBytes_GET_SIZE(certificate)) != 1
        or EVP_DigestUpdate(STATE, token, size) != 1
        or EVP_DigestFinal_ex(STATE, <unsigned char *>PyBytes_AS_STRING(digest), NULL) != 1
    ):
        raise RuntimeError("libcrypto could not digest")
    return digest


@cython.final
cdef class _Entry:
    cdef object granted
    cdef double exp
    cdef bytes token_digest
    cdef double end


@cython.final
cdef class TokenCache:
    """
    Positive and negative results, and who owns a token.

    `generation` rises with every revocation: what was asked before is not stored after. When full the
    entry closest to its end goes.
    """

    cdef readonly long long generation
    cdef Py_ssize_t _capacity, _negative_capacity
    cdef dict _entries, _negative, _owners
    cdef list _ends, _owner_ends
    cdef unsigned long long _hits, _negative_hits, _misses, _evictions

    def __init__(self, Py_ssize_t capacity=CAPACITY, Py_ssize_t negative_capacity=NEGATIVE_CAPACITY):
        self.generation = 0
        self._capacity = capacity
        self._negative_capacity = negative_capacity
        self._entries = {}
        self._ends = []
        self._negative = {}
        self._owners = {}
        self._owner_ends = []
        self._hits = self._negative_hits = self._misses = self._evictions = 0

    @staticmethod
    def key(bytes certificate not None, bytes token not None):
        """The key of a token presented with a certificate, given as SHA-256 of its DER."""
        return _key(certificate, PyBytes_AS_STRING(token), PyBytes_GET_SIZE(token))

    def find(self, bytes certificate not None, str token not None, double wall, double monotonic):
        """`lookup` by what was presented, in one call."""
        cdef Py_ssize_t size
        cdef const char *text = PyUnicode_AsUTF8AndSize(token, &size)
        return self._lookup(_key(certificate, text, size), wall, monotonic)

    def lookup(self, bytes key not None, double wall, double monotonic):
        """
        The grant, False for a token known to be inactive, True for "ask".

        Every hit re-checks the token's own end against the wall clock and the entry's against the
        monotonic one.
        """
        return self._lookup(key, wall, monotonic)

    cdef object _lookup(self, bytes key, double wall, double monotonic):
        cdef PyObject *found = PyDict_GetItemWithError(self._entries, key)
        cdef _Entry entry
        if found != NULL:
            entry = <_Entry>found
            if monotonic < entry.end and wall < entry.exp:
                self._hits += 1
                return entry.granted
            del self._entries[key]
        cdef object end = self._negative.get(key)
        if end is not None:
            if monotonic < <double>end:
                self._negative_hits += 1
                return False
            del self._negative[key]
        self._misses += 1
        return True

    def store(
        self, bytes key not None, bytes token_digest not None, granted not None, double wall, double monotonic,
        double ttl_s, long long generation,
    ):
        """
        Keep a grant for min(its rest, ttl); False if it was revoked meanwhile or has no rest.
        """
        cdef double exp = granted.exp
        cdef double rest = min(exp - wall, ttl_s)
        if generation != self.generation or rest <= 0:
            return False
        if key not in self._entries and len(self._entries) >= self._capacity:
            self._evict()
        cdef _Entry entry = _Entry.__new__(_Entry)
        entry.granted, entry.exp, entry.token_digest = granted, exp, token_digest
        entry.end = end = monotonic + rest
        self._entries[key] = entry
        self._negative.pop(key, None)
        heappush(self._ends, (end, key))
        if len(self._ends) > 2 * self._capacity + 16:
            self._ends = [((<_Entry>held).end, one) for one, held in self._entries.items()]
            heapify(self._ends)
        return True

    def store_inactive(self, bytes key not None, double monotonic, double ttl_s, long long generation):
        """
        Remember for `ttl_s` that a token is inactive; False if nothing was kept.
        """
        if generation != self.generation or ttl_s <= 0:
            return False
        if key not in self._negative and len(self._negative) >= self._negative_capacity:
            # All live equally long, so the oldest ends first.
            del self._negative[next(iter(self._negative))]
        self._negative.pop(key, None)
        self._negative[key] = monotonic + ttl_s
        return True

    def owns(self, bytes token_digest not None, bytes certificate not None, double wall):
        """
        Whether a token may be used with a certificate: True for its owner and for a token nobody owns.
        """
        owner = self._owners.get(token_digest)
        return owner is None or wall >= owner[1] or owner[0] == certificate

    def bind(self, bytes token_digest not None, bytes certificate not None, long long exp, double wall):
        """
        Make the certificate the token's owner until `exp`, if it has none; returns `owns`. When the table is full, the
        token that ends first loses its owner.
        """
        owner = self._owners.get(token_digest)
        if owner is not None and wall < owner[1]:
            return owner[0] == certificate
        self._owners.pop(token_digest, None)
        if len(self._owners) >= BINDINGS:
            self._unbind()
        self._owners[token_digest] = (certificate, exp)
        heappush(self._owner_ends, (exp, token_digest))
        if len(self._owner_ends) > 2 * BINDINGS + 16:
            self._owner_ends = [(held[1], one) for one, held in self._owners.items()]
            heapify(self._owner_ends)
        return True

    def drop(self, *, bytes token_digest=b"", str client_id="", bint everything=False):
        """
        Forget grants by token, by client, or all; returns how many. Raises the generation.
        """
        self.generation += 1
        doomed = [
            key
            for key, held in self._entries.items()
            if everything
            or (token_digest and (<_Entry>held).token_digest == token_digest)
            or (client_id and (<_Entry>held).granted.client_id == client_id)
        ]
        for key in doomed:
            del self._entries[key]
        return len(doomed)

    def statistics(self):
        """Counts since the start, and sizes now."""
        return {
            "entries": len(self._entries), "negative": len(self._negative), "bindings": len(self._owners),
            "hits": self._hits, "negative_hits": self._negative_hits, "misses": self._misses,
            "evictions": self._evictions,
        }

    cdef int _evict(self) except -1:
        cdef _Entry entry
        while self._ends:
            end, key = heappop(self._ends)
            entry = self._entries.get(key)
            if entry is not None and entry.end == <double>end:
                del self._entries[key]
                self._evictions += 1
                return 0
        return 0

    cdef int _unbind(self) except -1:
        while self._owner_ends:
            exp, token_digest = heappop(self._owner_ends)
            owner = self._owners.get(token_digest)
            if owner is not None and owner[1] == exp:
                del self._owners[token_digest]
                return 0
        return 0
