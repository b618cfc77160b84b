"""
A pinned hash map with the layout of `route_map`, and its peers' ways of writing it; for benchmarks.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clawker_cp.ebpf import Manager
from clawker_cp.engines.host.cgroups import find_cgroup2

SYSTEM_PYTHON = "/usr/bin/python3"
BCC = """
import sys, time, ctypes
from bcc.libbcc import lib
path, count, key_bytes, value_bytes = sys.argv[1].encode(), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rows = sys.stdin.buffer.read()
keys = [rows[i * key_bytes:(i + 1) * key_bytes] for i in range(count)]
values = rows[count * key_bytes:]
values = [values[i * value_bytes:(i + 1) * value_bytes] for i in range(count)]
fd = lib.bpf_obj_get(path)
assert fd >= 0
best = None
for _ in range(5):
    began = time.perf_counter_ns()
    for key, value in zip(keys, values):
        if lib.bpf_update_elem(fd, key, value, 0):
            sys.exit("refused")
    took = time.perf_counter_ns() - began
    best = took if best is None else min(best, took)
print(best)
"""


@contextmanager
def loaded_manager() -> Iterator[tuple[Manager, Path]]:
    """
    A manager with everything loaded below a scratch cgroup and pin directory, and that directory.
    """
    name = f"ckbench{os.getpid()}-{secrets.token_hex(3)}"
    parent = find_cgroup2() / name
    parent.mkdir()
    directory = Path("/sys/fs/bpf") / name
    manager = Manager(directory)
    try:
        manager.load(parent)
        yield manager, directory
    finally:
        manager.flush(force=True)
        parent.rmdir()


class ThroughCtypes:
    """The same libbpf, called with ctypes: one row a call, or a batch."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
        self._lib.bpf_map_update_batch.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_void_p,
        ]  # fmt: skip
        self._lib.bpf_map_update_elem.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64]
        self.fd = int(self._lib.bpf_obj_get(str(path).encode()))
        assert self.fd >= 0

    def each(self, keys: list[bytes], values: list[bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            assert self._lib.bpf_map_update_elem(self.fd, key, value, 0) == 0

    def batch(self, keys: bytes, values: bytes, count: int) -> None:
        number = ctypes.c_uint32(count)
        assert self._lib.bpf_map_update_batch(self.fd, keys, values, ctypes.byref(number), None) == 0

    def close(self) -> None:
        os.close(self.fd)


class _CreateOptions(ctypes.Structure):
    """`struct bpf_map_create_opts` of libbpf 1."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("btf", ctypes.c_uint32 * 4),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    )


class InnerMaps:
    """
    The other atomic way to replace a table: an array of one map, whose only row is changed to a map filled before.
    """

    HASH, ARRAY_OF_MAPS, NO_PREALLOC = 1, 12, 1

    def __init__(self, key_bytes: int, value_bytes: int, rows: int) -> None:
        self._lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
        self._lib.bpf_map_update_elem.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64]
        self._lib.bpf_map_update_batch.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_void_p,
        ]  # fmt: skip
        self._sizes = key_bytes, value_bytes, rows
        self._inner = self._create(self.HASH, *self._sizes, map_flags=self.NO_PREALLOC)
        self._outer = self._create(self.ARRAY_OF_MAPS, 4, 4, 1, inner_map_fd=self._inner)

    def _create(self, kind: int, key_bytes: int, value_bytes: int, rows: int, **more: int) -> int:
        options = _CreateOptions(size=ctypes.sizeof(_CreateOptions), **more)
        made = self._lib.bpf_map_create(kind, b"ckbench", key_bytes, value_bytes, rows, ctypes.byref(options))
        if made < 0:
            raise OSError(ctypes.get_errno(), "bpf_map_create")
        return int(made)

    def replace(self, keys: bytes, values: bytes, count: int) -> None:
        """
        Fill a new map and put it in the place of the old one.
        """
        made, number = self._create(self.HASH, *self._sizes, map_flags=self.NO_PREALLOC), ctypes.c_uint32(count)
        assert self._lib.bpf_map_update_batch(made, keys, values, ctypes.byref(number), None) == 0
        assert self._lib.bpf_map_update_elem(self._outer, bytes(4), made.to_bytes(4, "little"), 0) == 0
        os.close(self._inner)
        self._inner = made

    def close(self) -> None:
        os.close(self._inner)
        os.close(self._outer)


def through_bcc(path: Path, keys: list[bytes], values: list[bytes]) -> int | None:
    """
    Nanoseconds that Debian's python3-bpfcc takes for all rows, the best of five; None where it is not installed.
    """
    try:
        done = subprocess.run(
            [SYSTEM_PYTHON, "-c", BCC, str(path), str(len(keys)), str(len(keys[0])), str(len(values[0]))],
            input=b"".join(keys) + b"".join(values), capture_output=True, timeout=120, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return None
    if b"No module named 'bcc'" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr.decode()
    return int(done.stdout)
