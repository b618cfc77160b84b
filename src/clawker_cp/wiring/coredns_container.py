"""
CoreDNS as the container `clawker-coredns`, behind the gate (contract 8.7); the verbs of `CoreDnsChild`.

Only the gate asks it: the ring and the kernel let agents reach nothing at its address.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

import structlog

from clawker_cp.errors import ClawkerError
from clawker_cp.processes.coredns import KeptCoreDns
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock

log = structlog.get_logger()

STOP_LIMIT_S = 12.0


class Process(Protocol):
    """`engines.docker.stack.SiblingProcess`."""

    async def start(self, digest: str) -> bool: ...
    async def wait(self) -> None: ...
    async def stop(self) -> None: ...


class CoreDnsContainer(KeptCoreDns):
    """
    One container. `run` keeps it running until cancelled, and removes it then.

    One that an earlier control plane left is adopted.
    """

    def __init__(
        self, process: Process, corefile: Path, text: str, health_url: str, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        super().__init__(corefile, text, health_url, clock)
        self._process = process

    async def run(self) -> None:
        """
        As for every CoreDNS, and stop it at the end.
        """
        try:
            await super().run()
        finally:
            self.running = False
            try:
                async with asyncio.timeout(STOP_LIMIT_S):
                    await self._process.stop()
            except (ClawkerError, TimeoutError) as error:
                log.warning("coredns_left_running", cause=str(error))

    async def _live(self) -> str:
        """One life; returns why it ended."""
        try:
            await asyncio.to_thread(self._write)
            await self._process.start("")
        except ClawkerError as error:
            return str(error)
        except OSError as error:
            return f"its Corefile cannot be written: {error.strerror or error}"
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch_health(), name="coredns-health")
            await self._process.wait()
            watching.cancel()
        return "the container ended"
