"""
`clawker-cp run` on a machine of the test's own, in front of an outside world, as a user would call it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from clawker_cp.testing.world import HostNamespace, World


@dataclass(frozen=True)
class Outcome:
    """How one run ended: its exit code, the command's output, and the decisions that were shown."""

    code: int
    out: str
    err: str
    flows: list[dict[str, object]]
    summary: dict[str, object]

    def denied(self, **wanted: object) -> list[dict[str, object]]:
        """Denials whose fields equal `wanted`."""
        return [
            flow
            for flow in self.flows
            if flow["verdict"] == "FLOW_VERDICT_DENIED" and all(flow.get(k) == v for k, v in wanted.items())
        ]


class Machine:
    """A host namespace with a working directory for runs."""

    def __init__(self, host: HostNamespace, world: World) -> None:
        self.host = host
        self.world = world
        self.environment = host.environment(world)
        self.workdir = host.directory / "work"
        self.workdir.mkdir()
        self.workdir.chmod(0o777)

    def argv(self, *options: str, command: list[str]) -> list[str]:
        run = [sys.executable, "-m", "clawker_cp", "run", "--json", "--workdir", str(self.workdir)]
        return [*run, *options, "--", *command]

    async def run(self, *options: str, command: list[str], timeout_s: float = 60) -> Outcome:
        done = await self.host.run(self.argv(*options, command=command), env=self.environment, timeout_s=timeout_s)
        return outcome(done.code, done.out, done.err)

    async def python(self, code: str, *options: str, timeout_s: float = 60) -> Outcome:
        """Run a piece of Python inside the sandbox, with the system's interpreter."""
        return await self.run(*options, command=["/usr/bin/python3", "-c", code], timeout_s=timeout_s)


def outcome(code: int, out: str, err: str) -> Outcome:
    flows, summary = [], {}
    for line in err.splitlines():
        if not line.startswith('{"event"'):
            continue
        message = json.loads(line)
        if message["event"] == "flow":
            flows.append(message["flow"])
        elif message["event"] == "summary":
            summary = message
    return Outcome(code, out, err, flows, summary)


@asynccontextmanager
async def machine_with_world() -> AsyncIterator[Machine]:
    """
    A fresh machine and world; both are gone afterwards.
    """
    async with HostNamespace() as host, World(host) as world:
        yield Machine(host, world)
