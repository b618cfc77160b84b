"""
Refused calls in the log, at a bounded rate: whoever is refused decides how often.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

LINES_PER_S = 5.0
BURST = 20


class DenialLog:
    """
    Event `auth_denied`, a burst of `BURST` lines, then `LINES_PER_S`; a line after a gap says how many were left out.
    """

    def __init__(self, log: Any = None, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._log = structlog.get_logger() if log is None else log
        self._monotonic = monotonic
        self._left = float(BURST)
        self._at = monotonic()
        self._suppressed = 0
        self.total = 0

    def report(self, **fields: Any) -> None:
        """
        Log one refusal, or count it. The fields must hold no secret.
        """
        self.total += 1
        now = self._monotonic()
        self._left = min(BURST, self._left + (now - self._at) * LINES_PER_S)
        self._at = now
        if self._left < 1:
            self._suppressed += 1
            return
        self._left -= 1
        if self._suppressed:
            fields["suppressed"], self._suppressed = self._suppressed, 0
        self._log.warning("auth_denied", **fields)
