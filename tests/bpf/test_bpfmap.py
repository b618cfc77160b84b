"""The bridge to the kernel: maps, batches and the ring, and what a close does to those who use them meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from clawker_cp._fast import bpfmap, layout
from clawker_cp.testing.bpf_abi import OBJECTS
from clawker_cp.testing.bpf_cases import built

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

KEY_BYTES, VALUE_BYTES = layout.SIZES["container_map"]
ROWS = 1000
ROUNDS = 30


@pytest.fixture(scope="module")
def loaded() -> Iterator[bpfmap.BpfObject]:
    """The programs, loaded once and pinned nowhere."""
    built()
    made = bpfmap.BpfObject.load(str(OBJECTS / "decide.bpf.o"), pin_dir=None, agent_level=1, max_agents=ROWS)
    yield made
    made.close()


@pytest.fixture
def rows(loaded: bpfmap.BpfObject) -> Iterator[bpfmap.BpfMap]:
    """The map of agents, with no row."""
    opened = loaded.map("container_map", KEY_BYTES, VALUE_BYTES)
    opened.delete_many(b"".join(opened.all_keys()))
    yield opened
    opened.close()


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def value(number: int) -> bytes:
    return number.to_bytes(4, "little").ljust(VALUE_BYTES, b"\0")


def test_a_row_is_what_was_put(rows: bpfmap.BpfMap) -> None:
    """A row is read back as it was written, replaced, removed once, and missing afterwards."""
    rows.put(key(1), value(7))
    rows.put(key(1), value(8))
    assert (rows.get(key(1)), rows.all_keys(), rows.items()) == (value(8), [key(1)], [(key(1), value(8))])
    assert (rows.delete(key(1)), rows.delete(key(1)), rows.get(key(1))) == (True, False, None)


def test_a_batch_is_its_rows(rows: bpfmap.BpfMap) -> None:
    """A thousand rows go in and out by one call each; missing ones are counted out, and no row is no call."""
    numbers = range(ROWS)
    keys = b"".join(map(key, numbers))
    assert rows.put_many(keys, b"".join(map(value, numbers))) == ROWS
    assert sorted(rows.items()) == sorted((key(number), value(number)) for number in numbers)
    assert rows.delete(key(5)) and rows.delete_many(keys) == ROWS - 1
    assert (rows.all_keys(), rows.put_many(b"", b""), rows.delete_many(b"")) == ([], 0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows: rows.put(key(1)[1:], value(1)),
        lambda rows: rows.put(key(1), value(1) + b"x"),
        lambda rows: rows.get(b""),
        lambda rows: rows.delete(key(1) * 2),
        lambda rows: rows.put_many(key(1) * 2, value(1)),
        lambda rows: rows.put_many(key(1)[1:], value(1)),
    ],
    ids=["short key", "long value", "no key", "two keys", "one value for two", "torn key"],
)
def test_a_wrong_size_never_reaches_the_kernel(rows: bpfmap.BpfMap, wrong: Callable[[bpfmap.BpfMap], object]) -> None:
    """Keys and values of another size are refused by the map's name; the kernel would read beyond them."""
    with pytest.raises(ValueError, match="container_map"):
        wrong(rows)
    assert rows.all_keys() == []


def test_a_full_map_says_what_was_written(rows: bpfmap.BpfMap) -> None:
    """Past the map's size a batch fails with E2BIG and says how much of it there is."""
    numbers = range(ROWS + 1)
    with pytest.raises(OSError, match=rf"update {ROWS + 1} rows of container_map \({ROWS} written\)") as caught:
        rows.put_many(b"".join(map(key, numbers)), b"".join(map(value, numbers)))
    assert caught.value.errno == errno.E2BIG and len(rows.all_keys()) == ROWS


def test_what_is_closed_says_so(loaded: bpfmap.BpfObject) -> None:
    """Whatever is asked of a closed object or map is EBADF, a closed ring is empty, and closing twice is fine."""
    opened = loaded.map("container_map", KEY_BYTES, VALUE_BYTES)
    ring = bpfmap.RingBuffer(loaded.map("events", *layout.SIZES["events"]).fd)
    other = bpfmap.BpfObject.load(str(OBJECTS / "decide.bpf.o"), pin_dir=None, agent_level=1, max_agents=8)
    for each in (opened, ring, other):
        each.close()
        each.close()
    for asked in (
        lambda: opened.put(key(1), value(1)),
        lambda: opened.put_many(key(1), value(1)),
        lambda: opened.get(key(1)),
        opened.all_keys,
        lambda: ring.fd,
        lambda: other.map("container_map", KEY_BYTES, VALUE_BYTES),
        lambda: other.program_fd("clawker_connect4"),
    ):
        with pytest.raises(OSError) as caught:
            asked()
        assert caught.value.errno == errno.EBADF
    assert ring.drain(1) == b""


def test_a_ring_is_closed_beside_its_reader(loaded: bpfmap.BpfObject) -> None:
    """A thread that goes on reading a ring which another closes finds it empty, and never reads freed memory."""
    events = loaded.map("events", *layout.SIZES["events"])
    started, closed = threading.Barrier(2), threading.Event()

    def read(ring: bpfmap.RingBuffer) -> bytes:
        started.wait()
        while not closed.is_set():
            ring.drain(4096)
        return ring.drain(4096)

    with ThreadPoolExecutor(1) as reader:
        for _ in range(ROUNDS):
            closed.clear()
            ring = bpfmap.RingBuffer(events.fd)
            last = reader.submit(read, ring)
            started.wait()
            ring.close()
            closed.set()
            assert last.result() == b""
    events.close()


def test_a_map_is_closed_beside_its_writer(loaded: bpfmap.BpfObject, rows: bpfmap.BpfMap) -> None:
    """A batch under way is written whole before its map closes: none lands in what gets the descriptor's number."""
    keys, values = b"".join(map(key, range(ROWS))), b"".join(map(value, range(ROWS)))
    started = threading.Barrier(2)

    def write(opened: bpfmap.BpfMap) -> int:
        started.wait()
        while True:
            try:
                assert opened.put_many(keys, values) == ROWS
            except OSError as error:
                return error.errno or 0

    with ThreadPoolExecutor(1) as writer:
        for _ in range(ROUNDS):
            opened = loaded.map("container_map", KEY_BYTES, VALUE_BYTES)
            ended = writer.submit(write, opened)
            started.wait()
            opened.close()
            taken = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # the number that has just become free
            assert ended.result() == errno.EBADF
            os.close(taken)
    assert len(rows.all_keys()) == ROWS
