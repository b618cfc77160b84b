"""
Following the proxy's access log: new lines as they come, across rotation, bounded per read.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import orjson

POLL_S = 0.05
CHUNK_BYTES = 1 << 20


class AccessLogTail:
    """
    Calls `on_lines` with parsed records; a line that is no JSON object is counted and skipped.

    `rotate` renames the file and lets the writer open a new one once it is large.
    """

    def __init__(self, path: Path, on_lines: Callable[[list[dict[str, Any]]], None], *, from_end: bool) -> None:
        self._path = path
        self._on_lines = on_lines
        self._from_end = from_end
        self._file: BinaryIO | None = None
        self._partial = b""
        self.malformed = 0

    async def run(self) -> None:
        """
        Follow until cancelled.
        """
        try:
            while True:  # noqa: ASYNC110 - a file that grows has no event to wait for
                await asyncio.sleep(0 if self.read() else POLL_S)
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def read(self) -> bool:
        """
        Take what is there, at most `CHUNK_BYTES`; True if more may be waiting.
        """
        if self._file is None and not self._open():
            return False
        assert self._file is not None
        data = self._file.read(CHUNK_BYTES)
        if not data:
            self._reopen_if_replaced()
            return False
        lines = (self._partial + data).split(b"\n")
        self._partial = lines.pop()
        records = []
        for line in lines:
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                self.malformed += 1
                continue
            if isinstance(record, dict):
                records.append(record)
        if records:
            self._on_lines(records)
        return len(data) == CHUNK_BYTES

    def _open(self) -> bool:
        try:
            self._file = self._path.open("rb")
        except FileNotFoundError:
            self._from_end = False
            return False
        if self._from_end:
            self._file.seek(0, 2)
            self._from_end = False
        return True

    def _reopen_if_replaced(self) -> None:
        assert self._file is not None
        try:
            same = self._path.stat().st_ino == self._file_inode()
        except FileNotFoundError:
            return
        if not same:
            self._file.close()
            self._file = None
            self._partial = b""

    def _file_inode(self) -> int:
        assert self._file is not None
        return os.fstat(self._file.fileno()).st_ino
