"""
Reading what Envoy writes about traffic, as it is written, and keeping the file within bounds.

Reporting fails soft (I12): Envoy never waits for this, a damaged line is counted and skipped, and
who falls far behind loses the oldest records, counted. The application passes `run` a sink.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson
import structlog

from clawker_cp.errors import ClawkerError

log = structlog.get_logger()

POLL_S = 0.02
CHUNK_BYTES = 128 << 10  # what is parsed between two turns of the loop
BEHIND_LIMIT_BYTES = 64 << 20
ROTATE_BYTES = 50 << 20
BACKUPS = 3
ROTATE_CHECK_S = 5.0
LINE_LIMIT_BYTES = 1 << 20

Record = dict[str, Any]


class LogOwner(Protocol):
    """Who holds the file open: `EnvoyAdmin`."""

    async def reopen_logs(self) -> None: ...


class AccessLogTail:
    """
    Yields the records of `path` in batches, from where it ended when `open` was called.

    Survives rotation, by itself or by others. `lost_bytes` and `damaged` count what was left out.
    """

    def __init__(self, path: Path, owner: LogOwner | None = None, *, rotate_bytes: int = ROTATE_BYTES) -> None:
        self._path = path
        self._owner = owner
        self._rotate_bytes = rotate_bytes
        self._descriptor = -1
        self._inode = 0
        self._position = 0
        self._rest = b""
        self.lost_bytes = 0
        self.damaged = 0
        self.records = 0

    def open(self) -> None:
        """Begin at the present end of the file, if there is one."""
        self._reopen()
        if self._descriptor >= 0:
            self._position = os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Give the file back; fine when it is not open."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def statistics(self) -> Mapping[str, int]:
        """Counts since the start."""
        return {"records": self.records, "damaged": self.damaged, "lost_bytes": self.lost_bytes}

    async def run(self, sink: Callable[[list[Record]], None]) -> None:
        """Hand every batch to `sink` until cancelled; `sink` must not block."""
        rotation = time.monotonic() + ROTATE_CHECK_S
        try:
            while True:
                batch = self.read()
                if batch:
                    sink(batch)
                    await asyncio.sleep(0)
                else:
                    await asyncio.sleep(POLL_S)
                if time.monotonic() >= rotation:
                    rotation = time.monotonic() + ROTATE_CHECK_S
                    await self._rotate_if_large()
        finally:
            self.close()

    def read(self) -> list[Record]:
        """Return what has come since the last call, a bounded amount; empty = nothing new."""
        if self._descriptor < 0:
            self._reopen()
            if self._descriptor < 0:
                return []
        data = self._next_chunk()
        if not data:
            self._follow_rotation()
            return []
        *lines, rest = (self._rest + data).split(b"\n")
        if len(rest) > LINE_LIMIT_BYTES:
            self.damaged += 1
            rest = b""
        self._rest = rest
        batch = [record for record in map(self._parse, lines) if record is not None]
        self.records += len(batch)
        return batch

    async def rotate(self) -> None:
        """Put the file aside as `.1` (`.1` as `.2` and so on) and make Envoy begin a new one."""
        for number in range(BACKUPS, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path.with_name(f"{self._path.name}.{number - 1}") if number > 1 else self._path
            with contextlib.suppress(FileNotFoundError):
                newer.rename(older)
        if self._owner is not None:
            await self._owner.reopen_logs()

    # -- inner -------------------------------------------------------------------------------

    def _reopen(self) -> None:
        self.close()
        with contextlib.suppress(FileNotFoundError):
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            self._inode = os.fstat(self._descriptor).st_ino
        self._position = 0
        self._rest = b""

    def _next_chunk(self) -> bytes:
        behind = os.fstat(self._descriptor).st_size - self._position
        if behind > BEHIND_LIMIT_BYTES:
            skipped = behind - BEHIND_LIMIT_BYTES // 2
            self.lost_bytes += skipped
            self._position += skipped
            self._rest = b""
            log.warning("envoy_access_log_lost", bytes=skipped)
        elif behind < 0:  # somebody emptied it
            self._position = 0
            self._rest = b""
        data = os.pread(self._descriptor, CHUNK_BYTES, self._position)
        self._position += len(data)
        return data

    def _follow_rotation(self) -> None:
        try:
            inode = self._path.stat().st_ino
        except FileNotFoundError:
            return
        if inode != self._inode:
            # Envoy has written its last into the old file before it opened the new one.
            self._reopen()

    def _parse(self, line: bytes) -> Record | None:
        if not line.strip():
            return None
        try:
            record = orjson.loads(line)
        except ValueError:
            self.damaged += 1
            return None
        if not isinstance(record, dict):
            self.damaged += 1
            return None
        return settle(record)

    async def _rotate_if_large(self) -> None:
        try:
            if self._path.stat().st_size >= self._rotate_bytes:
                await self.rotate()
        except (OSError, ClawkerError) as failure:
            log.warning("envoy_access_log_not_rotated", cause=str(failure))


def settle(record: Record) -> Record:
    """
    Say in every record what became of the request.

    Routes tell Envoy the verdict; where it answers by itself (no route, a broken request, an
    origin that cannot be reached) the record has to be completed.
    """
    action = record.get("action")
    if action not in ("allowed", "denied"):
        record["action"] = action = "denied"
        record["reason"] = "request_refused"
    if action == "allowed":
        status = record.get("response_code")
        details = record.get("response_code_details")
        if isinstance(status, int) and status >= 400 and details not in (None, "-", "via_upstream"):
            if status >= 500:
                record["reason"] = "origin_error"
            else:
                record["action"], record["reason"] = "denied", "request_refused"
    record["reason"] = record.get("reason") or "forwarded"
    record["rule"] = record.get("rule") or ""
    return record
