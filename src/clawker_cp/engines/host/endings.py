"""
Exit codes of sandboxes that have ended: in memory, and a file each for the next control plane.

A sandbox's directory goes with it, and whoever waits for its code may only hear it from a control
plane that was started later. Called by the engine alone.
"""

from __future__ import annotations

from pathlib import Path

import structlog

log = structlog.get_logger()

KEPT = 1024


class Endings:
    """
    Codes by sandbox id, the newest `KEPT`. What cannot be written is known to this process alone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._codes: dict[str, int] = {}

    def load(self) -> None:
        """
        Read what an earlier process kept; a file that holds no code is taken away.
        """
        if not self._directory.is_dir():
            return
        for path in sorted(self._directory.iterdir(), key=lambda path: path.lstat().st_mtime_ns):
            try:
                self._codes[path.name] = int(path.read_text(encoding="ascii"))
            except (OSError, ValueError) as error:
                log.warning("engines_ending_skipped", path=str(path), cause=str(error))
                self._unlink(path.name)
        self._bound()

    def get(self, sandbox_id: str) -> int | None:
        """
        The exit code of a sandbox that has ended, None for one that has not or is forgotten.
        """
        return self._codes.get(sandbox_id)

    def put(self, sandbox_id: str, code: int) -> None:
        """
        Keep a code; a sandbox ends once, and later words for it are not heard.
        """
        if sandbox_id in self._codes:
            return
        self._codes[sandbox_id] = code
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            (self._directory / sandbox_id).write_text(str(code), encoding="ascii")
        except OSError as error:
            log.warning("engines_ending_unwritten", id=sandbox_id[:12], cause=str(error))
        self._bound()

    def _bound(self) -> None:
        while len(self._codes) > KEPT:
            oldest = next(iter(self._codes))
            del self._codes[oldest]
            self._unlink(oldest)

    def _unlink(self, name: str) -> None:
        try:
            (self._directory / name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("engines_ending_stays", name=name, cause=str(error))
