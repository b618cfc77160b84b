"""
The techniques of the threat list, inside a stock container: root, the engine's default capabilities.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clawker_cp.testing.docker_machine import NETWORK, docker_machine
from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.escapes import FILTER_ALONE, SEND_RETURNS
from clawker_cp.testing.served import serving

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.envoy, pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

TECHNIQUES = Path(__file__).with_name("techniques.py")


async def test_no_technique_gets_a_byte_out_of_a_stock_container() -> None:
    """As root with Docker's default capabilities and seccomp: nothing arrives outside, and denials are recorded."""
    async with docker_machine() as machine, serving(machine.machine):
        work = machine.machine.workdir
        (work / "techniques.py").write_bytes(TECHNIQUES.read_bytes())
        allowed = await machine.ctl("allow", "https://api.example.com")
        assert allowed.code == 0, allowed.err
        container = await machine.docker.agent(
            "esc", network=NETWORK, usr=True,
            host_config={"NetworkMode": NETWORK, "Binds": [f"{work}:/work"]},
        )  # fmt: skip
        await machine.wait_enrolled(container)
        await machine.machine.world.reset()
        done = await machine.inside(container, "/usr/bin/python3", "/work/techniques.py", timeout_s=150)
        packets = await machine.machine.world.packets()
        flows = await machine.flows("--verdict", "denied", "--last", "1000")
        await machine.docker.client.remove(container, force=True)
    results = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    through = [r for r in results if r["result"].startswith("through") and r["name"] not in SEND_RETURNS | FILTER_ALONE]
    strangers = [p for p in packets if p.get("dst") not in {"198.51.100.53", "198.51.100.10"}]

    assert len(results) >= 40, done.err[-2000:]
    assert through == []
    assert strangers == []
    assert len(flows) > 20
