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
from clawker_cp.processes.coredns import (
    HEALTHY_LIMIT_S,
    HEALTHY_POLL_S,
    RESTART_MAX_S,
    RESTART_MIN_S,
    STEADY_S,
)
from clawker_cp.processes.health import HealthCheck
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.durable import write_durably

log = structlog.get_logger()

STOP_LIMIT_S = 12.0


class Process(Protocol):
    """`engines.docker.stack.SiblingProcess`."""

    async def start(self, digest: str) -> bool: ...
    async def wait(self) -> None: ...
    async def stop(self) -> None: ...


class CoreDnsContainer:
    """
    One container. `run` keeps it running until cancelled, and removes it then; `running` says whether it answers.

    One that an earlier control plane left is adopted; CoreDNS reads a changed Corefile by itself.
    """

    def __init__(
        self, process: Process, corefile: Path, text: str, health_url: str, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._process = process
        self._corefile = corefile
        self._text = text
        self._health_url = health_url
        self._clock = clock
        self.running = False
        self.restarts = 0

    async def run(self) -> None:
        """
        Start it, and again after every end, with a pause that grows to `RESTART_MAX_S`.
        """
        pause = RESTART_MIN_S
        try:
            while True:
                began = self._clock.monotonic()
                cause = await self._live()
                self.running = False
                self.restarts += 1
                log.error(
                    "coredns_unavailable",
                    cause=cause,
                    blast_radius="the gate asks the forwarders itself",
                    retry_s=pause,
                )
                if self._clock.monotonic() - began > STEADY_S:
                    pause = RESTART_MIN_S
                await self._clock.sleep(pause)
                pause = min(pause * 2, RESTART_MAX_S)
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

    def _write(self) -> None:
        self._corefile.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._corefile, self._text.encode(), 0o644)

    async def _watch_health(self) -> None:
        check = HealthCheck(self._health_url, HEALTHY_POLL_S, HEALTHY_LIMIT_S)
        while not self.running:
            try:
                await check.wait()
            except TimeoutError:
                log.warning("coredns_not_healthy", url=self._health_url, limit_s=HEALTHY_LIMIT_S)
            else:
                self.running = True
                log.info("coredns_started" if not self.restarts else "coredns_recovered", restarts=self.restarts)
