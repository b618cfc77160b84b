"""
CoreDNS as a child: started with a Corefile, restarted for ever, ended with us (ruling R23).

Knows nothing of zones; the text of the Corefile is `dns.coredns`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from abc import ABC, abstractmethod
from pathlib import Path

import structlog

from clawker_cp.processes.descriptors import keep_descriptors
from clawker_cp.processes.health import HealthCheck
from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.durable import write_durably

log = structlog.get_logger()

HEALTHY_LIMIT_S, HEALTHY_POLL_S = 10.0, 0.05
RESTART_MIN_S, RESTART_MAX_S = 0.5, 10.0
STEADY_S = 60.0
STOP_LIMIT_S = 5.0
LINES_KEPT = 20


class KeptCoreDns(ABC):
    """
    A CoreDNS that is brought back for ever. `running` says whether it answers, `restarts` how often it ended.

    The Corefile is replaced by rename, and CoreDNS reads a changed one by itself.
    """

    def __init__(self, corefile: Path, text: str, health_url: str, clock: Clock = SYSTEM_CLOCK) -> None:
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

    @abstractmethod
    async def _live(self) -> str:
        """One life; returns why it ended."""

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


class CoreDnsChild(KeptCoreDns):
    """
    One child. `run` keeps it running until cancelled, and ends it then.
    """

    def __init__(self, binary: Path, corefile: Path, text: str, health_url: str, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(corefile, text, health_url, clock)
        self._binary = binary
        self._last: list[str] = []

    async def _live(self) -> str:
        """One life; returns why it ended."""
        try:
            await asyncio.to_thread(self._write)
            keep_descriptors()
            process = await asyncio.create_subprocess_exec(
                # Ends with us even if we are killed: it serves nobody but the gate.
                "setpriv", "--pdeathsig", "KILL", str(self._binary), "-conf", str(self._corefile),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": "/nonexistent"}, cwd="/",
            )  # fmt: skip
        except OSError as error:
            return f"cannot be started: {error.strerror or error}"
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read(process), name="coredns-output")
                watching = group.create_task(self._watch_health(), name="coredns-health")
                code = await process.wait()
                watching.cancel()
                await asyncio.wait([reading], timeout=STOP_LIMIT_S)
                reading.cancel()
        finally:
            if process.returncode is None:
                await _end(process)
        return f"exit {code}: {self._last[-1] if self._last else 'no words'}"

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            words = line.decode("utf-8", "replace").rstrip()
            self._last = [*self._last[-LINES_KEPT:], words]
            log.info("coredns_says", line=words[:512])


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_LIMIT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
