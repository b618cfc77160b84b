"""
Keeps the kernel side whole while the firewall is on: what somebody takes away is back within a second.

What cannot be put back is said once (`enforcement_unavailable`) and kept for whoever would open something:
while it stands nothing is enrolled or bypassed (contract 5.4).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from clawker_cp.errors import Unavailable
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock

log = structlog.get_logger()

LOOK_EVERY_S = 1.0
NEXT_STEP = "stop the agents or repair what it names, it is tried again every second"


class Mender(Protocol):
    """`ebpf.mending.Mender`; blocks, called in a thread."""

    def faults(self) -> Sequence[str]: ...
    def mend(self) -> Sequence[str]: ...


class LinkGuard:
    """
    One per server. `up` says whether there is anything to guard.
    """

    def __init__(self, mender: Mender, up: Callable[[], bool], clock: Clock = SYSTEM_CLOCK) -> None:
        self._mender = mender
        self._up = up
        self._clock = clock
        self._fault = ""

    async def run(self) -> None:
        """
        Look again and again until cancelled.
        """
        while True:
            await self.mend()
            await self._clock.sleep(LOOK_EVERY_S)

    async def mend(self) -> None:
        """
        Put back what is missing; remember what cannot be.
        """
        fault = told(await asyncio.to_thread(self._mender.mend)) if self._up() else ""
        if fault and not self._fault:
            log.error(
                "enforcement_unavailable",
                cause=fault,
                blast_radius="agents that are no longer judged are open until it is repaired",
                retry_s=LOOK_EVERY_S,
            )
        elif self._fault and not fault:
            log.info("enforcement_recovered")
        self._fault = fault

    async def fault(self) -> str:
        """
        What does not enforce at this moment, with the next step; "" if everything does.
        """
        found = told(await asyncio.to_thread(self._mender.faults))
        return f"{found}; {NEXT_STEP}" if found else ""

    def require_whole(self) -> None:
        """
        Raise `Unavailable` (`ENFORCEMENT_UNAVAILABLE`) while something could not be put back.
        """
        if self._fault:
            raise Unavailable(f"agents cannot be judged: {self._fault}", code="ENFORCEMENT_UNAVAILABLE", hint=NEXT_STEP)


def told(faults: Sequence[str]) -> str:
    """
    Faults as one line: the first, and how many more there are.
    """
    return f"{faults[0]}, and {len(faults) - 1} more" if len(faults) > 1 else "".join(faults)
