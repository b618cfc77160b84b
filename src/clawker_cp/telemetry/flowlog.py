"""
Where flow records go: bounded memory, subscribers, and `flows.jsonl` written off the loop.

Reporting never blocks enforcing (I12): a full disk or a slow subscriber is counted, never raised
and never waited for. Rotation: 50 MB, three older files, compressed.
"""

from __future__ import annotations

import asyncio
import gzip
import shutil
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from clawker_cp.telemetry.flows import Flow, encode

log = structlog.get_logger()

SUBSCRIBER_LIMIT = 4096
PENDING_LIMIT = 262144
ROTATE_BYTES = 50 * 1024 * 1024
BACKUPS = 3
WRITE_EVERY_S = 0.05


class Subscription:
    """
    One reader's buffer of `SUBSCRIBER_LIMIT` records; when full the oldest go and are counted.
    """

    def __init__(self, container_id: str) -> None:
        self.container_id = container_id
        self.lost = 0
        self._buffer: deque[Flow] = deque()
        self._ready = asyncio.Event()

    def offer(self, flow: Flow) -> None:
        """
        Take a record without waiting.
        """
        if self.container_id and flow.container_id != self.container_id:
            return
        if len(self._buffer) >= SUBSCRIBER_LIMIT:
            self._buffer.popleft()
            self.lost += 1
        self._buffer.append(flow)
        self._ready.set()

    async def next_batch(self) -> list[Flow]:
        """
        Wait for records and take all that wait.
        """
        await self._ready.wait()
        self._ready.clear()
        batch = list(self._buffer)
        self._buffer.clear()
        return batch

    @property
    def drained(self) -> bool:
        return not self._buffer


class FlowLog:
    """
    Takes records from anywhere on the loop; `run` writes them until cancelled.
    """

    def __init__(self, path: Path, *, memory: int = 65536) -> None:
        self._path = path
        self.memory_limit = memory
        self._memory: deque[Flow] = deque(maxlen=memory)
        self._pending: deque[Flow] = deque()
        self._subscriptions: set[Subscription] = set()
        self.lost: Counter[str] = Counter()
        self.taken = 0

    def add(self, flows: Iterable[Flow]) -> None:
        """
        Take records; the disk's queue is bounded and drops the newest, counted under `queue`.
        """
        for flow in flows:
            self.taken += 1
            self._memory.append(flow)
            if len(self._pending) < PENDING_LIMIT:
                self._pending.append(flow)
            else:
                self.lost["queue"] += 1
            for subscription in self._subscriptions:
                subscription.offer(flow)

    def recent(self, container_id: str = "") -> list[Flow]:
        """
        What memory still holds, oldest first.
        """
        return [flow for flow in self._memory if not container_id or flow.container_id == container_id]

    def find(self, event_id: str) -> Flow | None:
        """
        The record of an event id, from memory.
        """
        return next((flow for flow in reversed(self._memory) if flow.event_id == event_id), None)

    @asynccontextmanager
    async def subscribe(self, container_id: str = "") -> AsyncIterator[Subscription]:
        """
        Follow new records, of one agent or of all.
        """
        subscription = Subscription(container_id)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            self.lost["subscriber"] += subscription.lost

    async def run(self) -> None:
        """
        Write what was taken, in batches, until cancelled; the last batch is written too.
        """
        try:
            while True:
                await asyncio.sleep(WRITE_EVERY_S)
                await asyncio.to_thread(self._write)
        finally:
            self._write()

    def _write(self) -> None:
        if not self._pending:
            return
        batch = [self._pending.popleft() for _ in range(len(self._pending))]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            with self._path.open("ab") as out:
                out.write(b"\n".join(encode(flow) for flow in batch) + b"\n")
                size = out.tell()
            if size > ROTATE_BYTES:
                self._rotate()
        except OSError as error:
            self.lost["export"] += len(batch)
            log.warning("flows_unavailable", cause=str(error), blast_radius="flow records on disk", lost=len(batch))

    def _rotate(self) -> None:
        for number in range(BACKUPS - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}.gz")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number + 1}.gz"))
        moved = self._path.with_name(f"{self._path.name}.1")
        self._path.replace(moved)
        with moved.open("rb") as source, gzip.open(f"{moved}.gz", "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target)
        moved.unlink()
