"""
kill -9 of the server inside every RPC that changes something: afterwards the old state holds or the new one, and
nothing was opened on the way.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp.auth.scopes import admin_method_scopes, control_method_scopes
from clawker_cp.testing.machine import Machine
from clawker_cp.testing.mutations import READS

ROUNDS = int(os.environ.get("CLAWKER_TEST_KILLS_PER_RPC", "1"))
ANSWER_LIMIT_S = 60.0
RPCS = {method.rpartition("/")[2] for method in (*admin_method_scopes(), *control_method_scopes())}
# First those that need a host without agents.
MUTATIONS = ["FirewallRemove", "FirewallInit", *sorted(RPCS - READS - {"FirewallRemove", "FirewallInit"})]
REFUSED = {"FirewallDisable": "FAILED_PRECONDITION"}  # a running agent's firewall is never disabled
pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(120 + 20 * ROUNDS),
]  # fmt: skip


class Driver:
    """`testing.mutations` on the machine."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, *request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        async with asyncio.timeout(ANSWER_LIMIT_S):
            line = await self._process.stdout.readline()
        return json.loads(line)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def driver(machine: Machine) -> AsyncIterator[Driver]:
    errors = machine.host.directory / "driver.err"
    pipe = asyncio.subprocess.PIPE
    with errors.open("wb") as stderr:
        process = await machine.host.start(
            [sys.executable, "-m", "clawker_cp.testing.mutations", str(machine.workdir)],
            env=machine.environment, stdin=pipe, stdout=pipe, stderr=stderr,
        )  # fmt: skip
    made = Driver(process)
    try:
        yield made
        await made.ask("stop")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        print(errors.read_text()[-4000:])


@pytest.mark.parametrize("rpc", MUTATIONS)
async def test_killed_inside_it_leaves_the_old_or_the_new(driver: Driver, rpc: str) -> None:
    """Whatever the moment: whole, readable, nothing opened, and the caller knows that it does not know."""
    whole = await driver.ask("reference", rpc)
    assert whole["status"] == REFUSED.get(rpc, "OK")
    chance = random.Random(f"{rpc} 7")
    for _ in range(ROUNDS):
        delay = chance.uniform(0, whole["seconds"])
        killed = await driver.ask("kill", rpc, delay)

        assert killed["status"] in {"UNAVAILABLE", whole["status"]}, (delay, killed)
        allowed = [whole["new"]] if killed["status"] == "OK" else [whole["old"], whole["new"]]
        if rpc in {"FirewallRemove", "FirewallInit"}:
            allowed = [{**whole["old"], "on": True}]  # every start turns the firewall on
        other = {key: (value, whole["old"][key], whole["new"][key]) for key, value in killed["state"].items()}
        half = {key: values for key, values in other.items() if values[0] != allowed[-1][key]}
        assert killed["state"] in allowed, f"{rpc}, killed after {delay:.4f} s: found, old, new: {half}"
        bypassed = rpc in {"FirewallBypass", "FirewallEnable"}
        assert bypassed or not killed["opened"], (delay, killed)
