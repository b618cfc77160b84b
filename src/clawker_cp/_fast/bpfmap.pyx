# cython: language_level=3str
"""
The bridge to the kernel: objects, maps, links and the ring buffer, over bpf_shim.c and libbpf.

Keys and values are bytes, laid out by `layout.pyx`. Every failure is an OSError with the errno, what was done and to what.
Batches release the GIL once; a single map operation (0.4 us) keeps it. What runs without it holds the object's lock,
and so does `close`: another thread's close waits for the batch, and never pulls the memory, or the number of a
descriptor that the process gives out again, from under it. What is asked of a closed object is an OSError EBADF;
only its reader, whom nobody tells, finds a closed ring empty.
"""

import errno
import os
import threading

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc

from clawker_cp._fast cimport abi

cdef extern from "bpf_shim.h" nogil:
    struct bpf_object:
        pass
    struct shim_ring:
        void *ring
    const char *shim_log()
    int shim_version(unsigned int *major, unsigned int *minor)
    int shim_open(const char *path, bpf_object **object)
    int shim_prepare(bpf_object *object, const char *pin_dir, uint32_t level, const char *sized, uint32_t entries)
    int shim_load(bpf_object *object)
    void shim_close(bpf_object *object)
    int shim_map_fd(bpf_object *object, const char *name)
    int shim_program_fd(bpf_object *object, const char *name)
    int shim_attach(int program_fd, int cgroup_fd, uint32_t type)
    int shim_replace(int link_fd, int program_fd)
    int shim_link_info(int link_fd, uint64_t *cgroup_id, uint32_t *program_id)
    int shim_program_id(int program_fd, uint32_t *program_id)
    int shim_pin(int fd, const char *path)
    int shim_get(const char *path)
    int shim_update(int map, const void *key, const void *value, uint64_t flags)
    int shim_lookup(int map, const void *key, void *value)
    int shim_delete(int map, const void *key)
    int shim_next_key(int map, const void *key, void *next)
    int shim_update_batch(int map, const void *keys, const void *values, uint32_t count, uint32_t *done)
    int shim_delete_batch(int map, const void *keys, uint32_t count, size_t key_size, uint32_t *done)
    int shim_possible_cpus()
    int shim_ring_open(shim_ring *ring, int map)
    int shim_ring_fd(const shim_ring *ring)
    int shim_ring_drain(shim_ring *ring, abi.clawker_event *into, size_t room)
    void shim_ring_close(shim_ring *ring)
    int shim_run(int program_fd, void *context, uint32_t size, uint32_t *answer)


cdef int check(int rc, str what) except -1:
    """The one way a negative errno becomes an exception; returns `rc` otherwise."""
    if rc < 0:
        raise OSError(-rc, f"{what}: {os.strerror(-rc)}")
    return rc


cdef int closed(str what) except -1:
    raise OSError(errno.EBADF, f"{what}: it is closed")


def libbpf_version() -> str:
    cdef unsigned int major = 0, minor = 0
    shim_version(&major, &minor)
    return f"{major}.{minor}"


cdef class BpfObject:
    """One loaded object file; owns its programs and maps until `close`."""

    cdef bpf_object *_object
    cdef str _path

    def __cinit__(self):
        self._object = NULL

    @staticmethod
    def load(str path, *, pin_dir, unsigned int agent_level, unsigned int max_agents):
        """
        Open, size, pin (reusing what is pinned already) and load; blocks for tens of milliseconds.

        A pinned map of another layout is an OSError EINVAL. The verifier's words are on the
        exception's `log`.
        """
        cdef BpfObject self = BpfObject.__new__(BpfObject)
        cdef bytes path_bytes = os.fsencode(path)
        cdef bytes pin_bytes = os.fsencode(pin_dir) if pin_dir is not None else b""
        cdef const char *c_path = path_bytes
        cdef const char *c_pin = pin_bytes
        cdef bint pinned = pin_dir is not None
        cdef int rc
        self._path = path
        with nogil:
            rc = shim_open(c_path, &self._object)
            if rc == 0:
                rc = shim_prepare(self._object, c_pin if pinned else NULL, agent_level, b"container_map", max_agents)
            if rc == 0:
                rc = shim_load(self._object)
        if rc < 0:
            error = OSError(-rc, f"load {path}: {os.strerror(-rc)}")
            error.log = (<bytes>shim_log()).decode("utf-8", "replace")
            self.close()
            raise error
        return self

    def map(self, str name, int key_bytes, int value_bytes):
        cdef bytes c_name = name.encode()
        if self._object == NULL:
            closed(f"find map {name}")
        return BpfMap(os.dup(check(shim_map_fd(self._object, c_name), f"find map {name}")), name, key_bytes, value_bytes)

    def program_fd(self, str name) -> int:
        """Descriptor of a program, owned by this object."""
        cdef bytes c_name = name.encode()
        if self._object == NULL:
            closed(f"find program {name}")
        return check(shim_program_fd(self._object, c_name), f"find program {name}")

    def close(self) -> None:
        if self._object != NULL:
            shim_close(self._object)
            self._object = NULL

    def __dealloc__(self):
        if self._object != NULL:
            shim_close(self._object)


cdef class BpfMap:
    """One map by descriptor; owns the descriptor. Keys and values are bytes of fixed size."""

    cdef readonly int fd
    cdef readonly str name
    cdef readonly int key_bytes
    cdef readonly int value_bytes
    cdef object _lock

    def __cinit__(self, int fd, str name, int key_bytes, int value_bytes):
        self._lock = threading.Lock()
        self.fd = fd
        self.name = name
        self.key_bytes = key_bytes
        self.value_bytes = value_bytes

    @staticmethod
    def pinned(str path, int key_bytes, int value_bytes):
        cdef bytes c_path = os.fsencode(path)
        return BpfMap(check(shim_get(c_path), f"open pinned map {path}"), os.path.basename(path), key_bytes, value_bytes)

    cdef int _sizes(self, bytes key, bytes value) except -1:
        if len(key) != self.key_bytes or (value is not None and len(value) != self.value_bytes):
            raise ValueError(f"{self.name}: key or value has the wrong size")
        return 0

    def put(self, bytes key, bytes value, unsigned long flags=0) -> None:
        self._sizes(key, value)
        check(shim_update(self.fd, PyBytes_AS_STRING(key), PyBytes_AS_STRING(value), flags), f"update {self.name}")

    def get(self, bytes key):
        """The value, or None when there is no such key."""
        cdef bytes value = PyBytes_FromStringAndSize(NULL, self.value_bytes)
        cdef int rc
        self._sizes(key, None)
        rc = shim_lookup(self.fd, PyBytes_AS_STRING(key), PyBytes_AS_STRING(value))
        if rc == -2:
            return None
        check(rc, f"look up in {self.name}")
        return value

    def delete(self, bytes key) -> bool:
        """Remove a key; False when it was not there."""
        cdef int rc
        self._sizes(key, None)
        rc = shim_delete(self.fd, PyBytes_AS_STRING(key))
        if rc == -2:
            return False
        check(rc, f"delete from {self.name}")
        return True

    def put_many(self, bytes keys, bytes values) -> int:
        """Write rows laid out back to back, in one system call; returns how many."""
        cdef uint32_t count = len(keys) // self.key_bytes, done = 0
        cdef const char *k = PyBytes_AS_STRING(keys)
        cdef const char *v = PyBytes_AS_STRING(values)
        cdef int rc
        if len(keys) % self.key_bytes or len(values) != count * self.value_bytes:
            raise ValueError(f"{self.name}: keys and values do not match")
        if count == 0:
            return 0
        with self._lock, nogil:
            rc = shim_update_batch(self.fd, k, v, count, &done)
        check(rc, f"update {count} rows of {self.name} ({done} written)")
        return done

    def delete_many(self, bytes keys) -> int:
        """Remove keys laid out back to back; missing ones are fine. Returns how many were there."""
        cdef uint32_t count = len(keys) // self.key_bytes, done = 0
        cdef const char *k = PyBytes_AS_STRING(keys)
        cdef size_t size = self.key_bytes
        cdef int rc
        if count == 0:
            return 0
        with self._lock, nogil:
            rc = shim_delete_batch(self.fd, k, count, size, &done)
        check(rc, f"delete {count} rows of {self.name}")
        return done

    def all_keys(self) -> list:
        """All keys at this moment; rows that come and go meanwhile may be missed or seen."""
        cdef bytes last = None
        cdef bytes following
        cdef list found = []
        cdef int rc
        while True:
            following = PyBytes_FromStringAndSize(NULL, self.key_bytes)
            rc = shim_next_key(self.fd, PyBytes_AS_STRING(last) if last is not None else NULL,
                               PyBytes_AS_STRING(following))
            if rc == -2:
                return found
            check(rc, f"walk {self.name}")
            found.append(following)
            last = following

    def items(self) -> list:
        return [(key, value) for key in self.all_keys() if (value := self.get(key)) is not None]

    def close(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


cdef class RingBuffer:
    """The reading end of the event ring; one reader at a time, a second waits."""

    cdef shim_ring _ring
    cdef object _lock

    def __cinit__(self, int map_fd):
        self._lock = threading.Lock()
        memset(&self._ring, 0, sizeof(self._ring))
        check(shim_ring_open(&self._ring, map_fd), "open the event ring")

    @property
    def fd(self) -> int:
        """An epoll descriptor that is readable when records wait."""
        if self._ring.ring == NULL:
            closed("ask for the event ring's descriptor")
        return shim_ring_fd(&self._ring)

    def drain(self, size_t limit) -> bytes:
        """At most `limit` waiting records, back to back; none once it is closed."""
        cdef abi.clawker_event *buffer = <abi.clawker_event *>PyMem_Malloc(limit * sizeof(abi.clawker_event))
        cdef int count = 0  # of a closed ring
        if buffer == NULL:
            raise MemoryError
        try:
            with self._lock:
                if self._ring.ring != NULL:
                    with nogil:
                        count = shim_ring_drain(&self._ring, buffer, limit)
            check(count, "read the event ring")
            return PyBytes_FromStringAndSize(<char *>buffer, count * sizeof(abi.clawker_event))
        finally:
            PyMem_Free(buffer)

    def close(self) -> None:
        with self._lock:
            if self._ring.ring != NULL:
                shim_ring_close(&self._ring)

    def __dealloc__(self):
        if self._ring.ring != NULL:
            shim_ring_close(&self._ring)


def attach(int program_fd, int cgroup_fd, unsigned int attach_type) -> int:
    """Link a program to a cgroup; returns the link's descriptor."""
    cdef int rc
    with nogil:
        rc = shim_attach(program_fd, cgroup_fd, attach_type)
    return check(rc, f"attach a program (type {attach_type})")


def replace(int link_fd, int program_fd) -> None:
    """Swap the program of a link with no moment in between."""
    cdef int rc
    with nogil:
        rc = shim_replace(link_fd, program_fd)
    check(rc, "replace a linked program")


def pin(int fd, str path) -> None:
    cdef bytes c_path = os.fsencode(path)
    check(shim_pin(fd, c_path), f"pin {path}")


def open_pinned(str path) -> int:
    cdef bytes c_path = os.fsencode(path)
    return check(shim_get(c_path), f"open {path}")


def link_info(int link_fd) -> tuple[int, int]:
    """Ids of the cgroup a link is attached to, 0 once the kernel let go of it, and of its program."""
    cdef uint64_t cgroup_id = 0
    cdef uint32_t program = 0
    check(shim_link_info(link_fd, &cgroup_id, &program), "look at a link")
    return cgroup_id, program


def program_id(int program_fd) -> int:
    cdef uint32_t program = 0
    check(shim_program_id(program_fd, &program), "look at a program")
    return program


def run_program(int program_fd, bytes context) -> tuple[int, bytes]:
    """Run a `syscall` program once; its return value as an unsigned number, and `context` as it left it."""
    cdef bytearray copy = bytearray(context)
    cdef char *data = copy
    cdef uint32_t size = len(context), answer = 0
    cdef int rc
    with nogil:
        rc = shim_run(program_fd, data, size, &answer)
    check(rc, "run a program")
    return answer, bytes(copy)


def possible_cpus() -> int:
    return check(shim_possible_cpus(), "count the CPUs")
