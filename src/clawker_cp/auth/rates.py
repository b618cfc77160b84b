"""
How many token exchanges one address may ask for (contract 3.4); for the embedded authority and for Hydra's front.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from clawker_cp.runtime.asgi import Answer, refusal

BURST = 200
ADDRESSES_KEPT = 1024


class RateLimit:
    """
    One token bucket per address, `BURST` deep; 0 a second = no limit.

    Beyond `ADDRESSES_KEPT` the address that asked longest ago is forgotten.
    """

    def __init__(self, per_second: int, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._monotonic = monotonic
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admits(self, peer: str) -> bool:
        """
        Take one from the bucket of an address; False if it is empty.
        """
        if self._per_second <= 0:
            return True
        now = self._monotonic()
        level, at = self._buckets.pop(peer, (float(BURST), now))
        level = min(BURST, level + (now - at) * self._per_second)
        self._buckets[peer] = (max(level - 1, 0.0), now)
        while len(self._buckets) > ADDRESSES_KEPT:
            self._buckets.popitem(last=False)
        return level >= 1


def too_many() -> Answer:
    """
    What an address hears whose bucket is empty.
    """
    return refusal(429, "temporarily_unavailable", "too many exchanges", **{"Retry-After": "1"})
