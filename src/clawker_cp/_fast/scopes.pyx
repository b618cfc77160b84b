# cython: language_level=3, boundscheck=False, wraparound=False
"""
Whether a token's scope text holds a scope, compiled: one scan, nothing allocated.

Twin of `_pure/scopes.py`, which states the contract; chosen by `accel.py`.
"""

from cpython.unicode cimport PyUnicode_GET_LENGTH, PyUnicode_1BYTE_DATA
from libc.string cimport memcmp, memchr

cdef extern from "Python.h":
    int PyUnicode_IS_ASCII(object text)


def has_scope(str text not None, str required not None):
    """
    Whether `required` is one of the words of `text`; case-sensitive, an empty word is no scope.
    """
    cdef Py_ssize_t wanted = PyUnicode_GET_LENGTH(required)
    if wanted == 0:
        return False
    if not (PyUnicode_IS_ASCII(text) and PyUnicode_IS_ASCII(required)):
        return required in text.split(" ")
    cdef const char *at = <const char *>PyUnicode_1BYTE_DATA(text)
    cdef const char *end = at + PyUnicode_GET_LENGTH(text)
    cdef const char *word = <const char *>PyUnicode_1BYTE_DATA(required)
    cdef const char *space
    while True:
        space = <const char *>memchr(at, 32, end - at)
        if space == NULL:
            return end - at == wanted and memcmp(at, word, wanted) == 0
        if space - at == wanted and memcmp(at, word, wanted) == 0:
            return True
        at = space + 1


def scope_words(str text not None):
    """
    The scopes of a text.
    """
    return frozenset([word for word in text.split(" ") if word])
