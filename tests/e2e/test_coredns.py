"""
The real CoreDNS behind the gate: it answers, agents do not notice when it dies, and it comes back.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from clawker_cp.testing.frozen import freeze
from clawker_cp.testing.machine import Machine, machine_with_world
from clawker_cp.testing.peers import WHY, peer
from clawker_cp.testing.served import serving

COREDNS = peer("coredns")
pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.envoy, pytest.mark.timeout(120),
    pytest.mark.skipif(COREDNS is None, reason=WHY),
]  # fmt: skip


@pytest_asyncio.fixture
async def machine() -> AsyncIterator[Machine]:
    async with machine_with_world() as machine:
        machine.environment["CLAWKER_CP_DNS__COREDNS"] = str(COREDNS)
        yield machine


async def _counted(machine: Machine) -> float:
    """Questions that CoreDNS has had, by its own count; -1 when it does not say."""
    done = await machine.host.run(["curl", "-sS", "-m", "3", "http://127.0.0.1:9956/metrics"])
    lines = [line for line in done.out.splitlines() if line.startswith("coredns_dns_requests_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if done.code == 0 else -1.0


def _coredns(machine: Machine) -> int:
    """CoreDNS's process among this machine's; other suites have theirs."""
    for pid in (machine.host.cgroup / "cgroup.procs").read_text().split():
        if "coredns/Corefile" in Path(f"/proc/{pid}/cmdline").read_text():
            return int(pid)
    raise AssertionError("CoreDNS does not run")


async def _until(machine: Machine, wanted: bool) -> None:
    async with asyncio.timeout(20):
        while ((await _counted(machine)) >= 0) is not wanted:
            await asyncio.sleep(0.05)


async def test_names_go_through_it_and_past_it_when_it_is_dead(machine: Machine) -> None:
    """Questions of allowed names reach it; silent or dead, the gate asks the forwarders itself, and it comes back."""
    resolve = "import socket, sys; print(socket.gethostbyname(sys.argv[1]))"

    async def ask(name: str) -> str:
        done = await machine.run(
            "--allow", f"https://{name}", command=["/usr/bin/python3", "-c", resolve, name], timeout_s=40
        )
        return done.out.strip()

    async with serving(machine) as served:
        await _until(machine, True)
        before = await _counted(machine)
        first = await ask("api.example.com")
        asked = await _counted(machine)
        status = json.loads((await served.get("http://127.0.0.1:7080/healthz?verbose=1"))[1])
        freeze(_coredns(machine))
        while_silent = await ask("www.example.com")
        os.kill(_coredns(machine), signal.SIGKILL)
        without = await ask("git.example.org")
        await _until(machine, True)

    assert first == "198.51.100.10" and asked > before >= 0
    assert status["components"]["dns"]["implementation"] == "gate+coredns"
    assert while_silent and without
    log = (machine.host.directory / "state" / "logs" / "clawker-controlplane.log").read_text()
    assert '"coredns_unavailable"' in log and '"coredns_recovered"' in log
