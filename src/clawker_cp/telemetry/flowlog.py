"""
Where flow records go: bounded memory, subscribers, and `flows.jsonl` written off the loop.

Reporting never blocks enforcing (I12): a full disk or a slow subscriber is counted, never raised
and never waited for. Everything but `_FlowFile` is used on the loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog

from clawker_cp.config import FLOW_BUFFER, FLOW_WRITE_EVERY_S, FLOWS_WAITING, FLUSH_LIMIT_S
from clawker_cp.telemetry.flows import Flow, FlowFilter, Loss, decode, encode_lines
from clawker_cp.telemetry.rotation import RotatingFile

log = structlog.get_logger()

# Records encoded in one go: about 0.3 ms with the GIL held, so the loop is not kept waiting.
ENCODE_AT_ONCE = 512
_EVENT_ID = re.compile(r"[kdp]-[0-9a-f]{1,32}-[0-9]{1,24}")
_ALL = FlowFilter()


class Subscription:
    """
    One reader's buffer of `FLOW_BUFFER` records; when full the oldest go, are counted, and `losses` tells.
    """

    def __init__(self, wanted: FlowFilter = _ALL) -> None:
        self._wanted = wanted
        self._everything = wanted == _ALL
        self._buffer: deque[Flow] = deque()
        self._ready = asyncio.Event()
        self._untold: Counter[str] = Counter()
        self.lost = 0

    def offer(self, flows: Sequence[Flow]) -> None:
        """
        Take what is wanted of some records, without waiting.
        """
        wanted = flows if self._everything else [flow for flow in flows if self._wanted.admits(flow)]
        if not wanted:
            return
        self._buffer.extend(wanted)
        for _ in range(len(self._buffer) - FLOW_BUFFER):
            self._untold[self._buffer.popleft().container_id] += 1
            self.lost += 1
        self._ready.set()

    async def next_batch(self) -> list[Flow]:
        """
        Wait for records and take all that wait. Cancelling loses nothing.
        """
        await self._ready.wait()
        self._ready.clear()
        batch = list(self._buffer)
        self._buffer.clear()
        return batch

    def losses(self) -> list[Loss]:
        """
        What this reader lost since it last asked, by agent.
        """
        told = [Loss(container, "subscriber", count) for container, count in sorted(self._untold.items())]
        self._untold.clear()
        return told

    @property
    def drained(self) -> bool:
        return not self._buffer


class FlowLog:
    """
    Takes records from anywhere on the loop; `run` writes them until cancelled.

    Memory holds the latest `per_agent` records of each agent and `memory` in all; beyond that the agents
    with most lose their oldest, so a noisy one never pushes out a quiet one. Nothing here raises
    for what happens on disk; `lost` counts by place: `kernel`, `queue`, `subscriber`, `export`.
    """

    def __init__(self, path: Path, *, memory: int = 65536, per_agent: int = 4096) -> None:
        self._file = _FlowFile(path)
        self.memory_limit = memory
        self._per_agent = min(per_agent, memory)
        self._rings: dict[str, deque[Flow]] = {}
        self._held = 0
        self._pending: list[Flow] = []
        self._subscriptions: set[Subscription] = set()
        self._lost: Counter[str] = Counter()
        self.taken = 0

    def add(self, flows: Iterable[Flow]) -> None:
        """
        Take records; the disk's queue is bounded and drops the newest, counted under `queue`.
        """
        batch = flows if isinstance(flows, list) else list(flows)
        self.taken += len(batch)
        room = FLOWS_WAITING - len(self._pending) - self._file.waiting
        self._pending += batch if room >= len(batch) else batch[: max(room, 0)]
        self._lost["queue"] += max(len(batch) - max(room, 0), 0)
        rings = self._rings
        for flow in batch:
            ring = rings.get(flow.container_id)
            if ring is None:
                ring = rings[flow.container_id] = deque(maxlen=self._per_agent)
            self._held += len(ring) < self._per_agent
            ring.append(flow)
            if flow.lost_before:
                self._lost["kernel"] += flow.lost_before
        if self._held > self.memory_limit:
            self._shed()
        for subscription in self._subscriptions:
            subscription.offer(batch)

    def _shed(self) -> None:
        """Cut the longest rings to one length, so that an eighth of the memory is free again."""
        left, cap = self.memory_limit - self.memory_limit // 8, 0
        lengths = sorted(len(ring) for ring in self._rings.values())
        for number, length in enumerate(lengths):
            cap = left // (len(lengths) - number)
            if length > cap:
                break
            left -= length
        for container, ring in list(self._rings.items()):
            while len(ring) > cap:
                ring.popleft()
            if not ring:
                del self._rings[container]
        self._held = sum(map(len, self._rings.values()))

    def recent(self, container_id: str = "") -> list[Flow]:
        """
        What memory still holds of one agent as it came, or of all by time; oldest first.
        """
        if container_id:
            return list(self._rings.get(container_id, ()))
        return sorted((flow for ring in self._rings.values() for flow in ring), key=lambda flow: flow.time_unix_ns)

    def forget(self, container_id: str) -> None:
        """
        Drop the memory of an agent that will not be asked about; the file keeps its records.
        """
        self._held -= len(self._rings.pop(container_id, ()))

    def find(self, event_id: str) -> Flow | None:
        """
        The record of an event id, from memory.
        """
        return _find(event_id, [*self._rings.values()])

    async def search(self, event_id: str, *, limit_s: float = 10.0) -> Flow | None:
        """
        The record of an event id, from memory, else from the file and its backups, off the loop.

        None if it is unknown, aged out, no event id at all, or not found within `limit_s`.
        """
        if not _EVENT_ID.fullmatch(event_id):
            return None
        rings = [list(ring) for ring in self._rings.values()]
        self._flush_pending()
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.to_thread(lambda: _find(event_id, rings) or self._file.search(event_id))
        except TimeoutError:
            return None

    @asynccontextmanager
    async def subscribe(self, container_id: str = "", *, wanted: FlowFilter = _ALL) -> AsyncIterator[Subscription]:
        """
        Follow new records: of one agent, or those a filter admits, or all.
        """
        if container_id:
            wanted = msgspec.structs.replace(wanted, container_ids=frozenset({container_id}))
        subscription = Subscription(wanted)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            self._lost["subscriber"] += subscription.lost

    async def run(self) -> None:
        """
        Write what was taken, in batches, until cancelled; what is left then is written within `FLUSH_LIMIT_S`.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._compress(), name="flows-compress")
                while True:
                    await asyncio.sleep(FLOW_WRITE_EVERY_S)
                    if self._pending:
                        self._flush_pending()
                        await asyncio.to_thread(self._file.drain)
        finally:
            self._flush_pending()
            try:
                async with asyncio.timeout(FLUSH_LIMIT_S):
                    await asyncio.to_thread(self.close)
            except TimeoutError:
                log.warning("flows_unflushed", records=self._file.waiting)

    def close(self) -> None:
        """
        Write what waits and close the file; the next write opens it again. Blocks.
        """
        self._flush_pending()
        self._file.drain()
        self._file.close()

    def _flush_pending(self) -> None:
        if self._pending:
            batch, self._pending = self._pending, []
            self._file.put(batch)

    async def _compress(self) -> None:
        while True:
            await asyncio.to_thread(self._file.compress)
            await asyncio.sleep(1.0)

    @property
    def lost(self) -> Counter[str]:
        """
        Records lost by place since the start.
        """
        lost = Counter(self._lost)
        lost["subscriber"] += sum(subscription.lost for subscription in self._subscriptions)
        lost["export"] += self._file.lost
        return lost

    @property
    def writable(self) -> bool:
        """Whether the disk took what was last written."""
        return not self._file.failing

    def statistics(self) -> dict[str, int]:
        """
        Taken, held in memory, waiting for the disk, subscribers, and `lost_<where>`.
        """
        return {
            "taken": self.taken,
            "held": self._held,
            "waiting": len(self._pending) + self._file.waiting,
            "subscribers": len(self._subscriptions),
            **{f"lost_{where}": count for where, count in self.lost.items()},
        }


class _FlowFile:
    """
    The side of the disk: batches come in from the loop, one thread at a time writes them.

    A batch handed over is written by whoever drains next, so cancelling a drain loses nothing.
    """

    def __init__(self, path: Path) -> None:
        self._file = RotatingFile(path)
        self._batches: deque[list[Flow]] = deque()
        self._lock = threading.Lock()
        self.failing = False
        self._writing = 0
        self.lost = 0

    @property
    def waiting(self) -> int:
        """Records handed over and not yet on disk, within one `ENCODE_AT_ONCE`."""
        return self._writing + sum(map(len, tuple(self._batches)))

    def put(self, batch: list[Flow]) -> None:
        self._batches.append(batch)

    def drain(self) -> None:
        with self._lock:
            while self._batches:
                batch = self._batches.popleft()
                for start in range(0, len(batch), ENCODE_AT_ONCE):
                    self._writing = len(batch) - start
                    self._write(batch[start : start + ENCODE_AT_ONCE])
                self._writing = 0

    def _write(self, flows: list[Flow]) -> None:
        try:
            self._file.write(encode_lines(flows))
        except OSError as error:
            self.lost += len(flows)
            self._fail(error)
            return
        try:
            if self._file.full:
                self._file.rotate()
        except OSError as error:
            self._fail(error)
            return
        if self.failing:
            self.failing = False
            log.info("flows_recovered", lost=self.lost)

    def _fail(self, error: OSError) -> None:
        self._file.close()
        if not self.failing:  # once per outage: a full disk must not fill the log too
            self.failing = True
            log.warning("flows_unavailable", cause=str(error), blast_radius="flow records on disk", retry_s=0)

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def compress(self) -> None:
        try:
            if self._file.uncompressed:
                self._file.compress()
        except OSError as error:
            log.warning("flows_uncompressed", cause=str(error))

    def search(self, event_id: str) -> Flow | None:
        self.drain()
        start = f'{{"event_id":"{event_id}",'.encode()
        for file in self._file.newest_first():
            # A backup that was torn or spoilt hides its own records and none of the others'.
            with contextlib.suppress(OSError, EOFError, zlib.error, msgspec.MsgspecError):
                for line in file:
                    if line.startswith(start):
                        return decode(line)
        return None


def _find(event_id: str, rings: Iterable[Iterable[Flow]]) -> Flow | None:
    return next((flow for ring in rings for flow in ring if flow.event_id == event_id), None)
