"""
A token authority as a process for benchmarks: the embedded one or the real Hydra behind our front.

Run as `python authority_server.py {embedded|hydra} DIRECTORY`. It registers the CLI's client, puts tokens and signed
assertions (one a line) into the directory, prints the addresses as JSON, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import structlog
import uvloop

from clawker_cp.testing.authority_world import AuthorityWorld, EmbeddedWorld, HydraWorld
from clawker_cp.testing.certificates import TestCa
from clawker_cp.testing.peers import peer

TOKENS = 200  # more than are ever in flight: callers of one token would share a question
ASSERTIONS = 1500
ASSERTION_LIFE_S = 240


async def run(kind: str, directory: Path) -> None:
    """Serve until standard input ends."""
    ca = TestCa(directory)
    world: AuthorityWorld = EmbeddedWorld(directory, ca)
    if kind == "hydra":
        world = HydraWorld(directory, ca, binary=peer("hydra") or Path())
    else:
        ca.server()
    async with world.running():
        (directory / "tokens").write_text("\n".join([await world.token() for _ in range(TOKENS)]))
        end = int(world.now) + ASSERTION_LIFE_S
        signed = [world.sign(world.claims(exp=end)) for _ in range(ASSERTIONS)]
        (directory / "assertions").write_text("\n".join(signed))
        addresses = {
            "introspect": f"{world.admin}/admin/oauth2/introspect",
            "exchange": f"{world.public}/oauth2/token",
            "ca": str(directory / "ca.pem"),
        }
        print(json.dumps(addresses), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    uvloop.run(run(sys.argv[1], Path(sys.argv[2])))
