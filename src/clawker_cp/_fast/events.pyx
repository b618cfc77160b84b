# cython: language_level=3str
"""
Ring buffer records to tuples, many at a time.

Field order is `FIELDS`; the plain twin in `_pure.events` decodes the same bytes with `struct`.
"""

from cpython.bytes cimport PyBytes_AS_STRING

from clawker_cp._fast cimport abi


def decode_events(bytes buffer) -> list:
    """
    Decode records back to back; a partial record at the end is an error.
    """
    cdef Py_ssize_t size = sizeof(abi.clawker_event)
    cdef Py_ssize_t count = len(buffer) // size, i
    cdef const abi.clawker_event *e = <const abi.clawker_event *>PyBytes_AS_STRING(buffer)
    cdef list out = []
    if len(buffer) % size:
        raise ValueError("events: a partial record")
    for i in range(count):
        out.append((
            e[i].ktime_ns, e[i].cgroup_id, e[i].sequence, e[i].cookie, <bytes>e[i].addr[:16], e[i].identity,
            e[i].policy, e[i].rule, e[i].uid, e[i].pid, e[i].port, e[i].proxy_port, e[i].verdict, e[i].reason,
            e[i].hook, e[i].family, e[i].protocol, e[i].type, e[i].flags,
        ))
    return out
