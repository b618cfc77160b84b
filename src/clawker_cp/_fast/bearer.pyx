# cython: language_level=3
"""
Where the bearer token of a call stands in its metadata, compiled.

Twin of `_pure/bearer.py`, which states the contract; chosen by `accel.py`.
"""

cdef str HEADER = "authorization"
cdef str PREFIX = "Bearer "
cdef Py_ssize_t BEGIN = len(PREFIX)
MAX_TOKEN_BYTES = 8 * 1024
cdef Py_ssize_t LONGEST = BEGIN + MAX_TOKEN_BYTES


def presented_token(metadata not None):
    """
    Return what stands after `Bearer ` in the only header of that name; "" without one, or above 8 KiB.
    """
    cdef object found = None, key, value
    for key, value in metadata:
        if key == HEADER:
            if found is not None:
                return ""
            found = value
    if type(found) is not str or len(<str>found) > LONGEST or not (<str>found).startswith(PREFIX):
        return ""
    return (<str>found)[BEGIN:]
