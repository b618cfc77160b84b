# cython: language_level=3str
"""
Ring buffer records to tuples, many at a time.

The plain twin in `_pure.events` decodes the same bytes with `struct`. What makes this one worth having: records
come in series from one agent, so objects that equal the last record's are shared, and they are made as what the
caller wants in one go.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint64_t
from libc.string cimport memcmp

from clawker_cp._fast cimport abi

cdef extern from "Python.h":
    object PyType_GenericAlloc(PyTypeObject *kind, Py_ssize_t items)
    void PyObject_GC_UnTrack(PyObject *made)
    void PyTuple_SET_ITEM(object row, Py_ssize_t at, PyObject *value)

cdef Py_ssize_t FIELDS = 19


cdef inline void put(object row, Py_ssize_t at, object value):
    """Give a new row one of its objects; the row keeps its own reference."""
    Py_INCREF(value)
    PyTuple_SET_ITEM(row, at, <PyObject *>value)


def decode_events(bytes buffer, type kind=tuple) -> list:
    """
    Decode records back to back; a partial record at the end is an error. `kind` is a tuple type of 19 fields.
    """
    cdef Py_ssize_t size = sizeof(abi.clawker_event)
    cdef Py_ssize_t count = len(buffer) // size, i
    cdef const abi.clawker_event *e = <const abi.clawker_event *>PyBytes_AS_STRING(buffer)
    cdef const abi.clawker_event *last = NULL
    cdef object row, cgroup_id = None, addr = None, identity = None, uid = None, pid = None, port = None, proxy_port = None
    cdef list out = []
    if len(buffer) % size:
        raise ValueError("events: a partial record")
    if not issubclass(kind, tuple) or kind.__dictoffset__:
        raise TypeError("events: rows are tuples without attributes of their own")
    for i in range(count):
        if last == NULL or last.cgroup_id != e.cgroup_id:
            cgroup_id = e.cgroup_id
        if last == NULL or memcmp(last.addr, e.addr, 16):
            addr = PyBytes_FromStringAndSize(<const char *>e.addr, 16)
        if last == NULL or last.identity != e.identity:
            identity = e.identity
        if last == NULL or last.uid != e.uid:
            uid = e.uid
        if last == NULL or last.pid != e.pid:
            pid = e.pid
        if last == NULL or last.port != e.port:
            port = e.port
        if last == NULL or last.proxy_port != e.proxy_port:
            proxy_port = e.proxy_port
        row = PyType_GenericAlloc(<PyTypeObject *>kind, FIELDS)
        put(row, 0, e.ktime_ns)
        put(row, 1, cgroup_id)
        put(row, 2, e.sequence)
        put(row, 3, e.cookie)
        put(row, 4, addr)
        put(row, 5, identity)
        put(row, 6, e.policy)
        put(row, 7, e.rule)
        put(row, 8, uid)
        put(row, 9, pid)
        put(row, 10, port)
        put(row, 11, proxy_port)
        put(row, 12, e.verdict)
        put(row, 13, e.reason)
        put(row, 14, e.hook)
        put(row, 15, e.family)
        put(row, 16, e.protocol)
        put(row, 17, e.type)
        put(row, 18, e.flags)
        # Numbers and bytes hold nothing: a row can be in no cycle, and the collector need not look at thousands.
        PyObject_GC_UnTrack(<PyObject *>row)
        out.append(row)
        last = e
        e += 1
    return out
