"""
The techniques of docs/threats, inside a real sandbox, as an ordinary user and as root.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from clawker_cp.testing.escapes import FILTER_ALONE, FRAMES, SEND_RETURNS
from clawker_cp.testing.machine import Machine, machine_with_world

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

TECHNIQUES = Path(__file__).with_name("techniques.py")
# Docker's default set, raw sockets included.
DOCKER = (
    "chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "net_bind_service", "net_raw",
    "sys_chroot", "mknod", "audit_write", "setfcap",
)  # fmt: skip
AS_ROOT = ["--allow-root", "--user", "0", "--no-seccomp", *(w for c in DOCKER for w in ("--capability", c))]
AS_ROOT_FILTERED = [option for option in AS_ROOT if option != "--no-seccomp"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine() -> AsyncIterator[Machine]:
    async with machine_with_world() as made:
        yield made


@pytest.mark.parametrize(
    "options",
    [[], ["--no-seccomp"], AS_ROOT, AS_ROOT_FILTERED],
    ids=["user", "user-unfiltered", "root", "root-filtered"],
)
async def test_no_technique_gets_a_byte_out(machine: Machine, options: list[str]) -> None:
    """Every technique ends in an error or a dropped packet, and nothing of it arrives outside."""
    (machine.workdir / "techniques.py").write_bytes(TECHNIQUES.read_bytes())
    await machine.world.reset()
    done = await machine.run(
        "--allow", "https://api.example.com", *options, command=["/usr/bin/python3", "techniques.py"], timeout_s=120
    )
    results = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    excused = SEND_RETURNS | FILTER_ALONE if "--no-seccomp" in options else SEND_RETURNS - FRAMES
    through = [r for r in results if r["result"].startswith("through") and r["name"] not in excused]
    slow = [r for r in results if r["fast"] and r["s"] > 0.3]
    packets = await machine.world.packets()
    strangers = [p for p in packets if not _expected(p)]

    assert len(results) >= 58, done.err[-2000:]
    assert through == []
    assert slow == []
    assert strangers == []
    assert len(done.flows) > 20
    if options is AS_ROOT:  # raw frames pass no socket hook: the ring dropped them, and said so (R18)
        dropped = {flow["reason"] for flow in done.flows if flow.get("hook") == "ring"}
        assert {"malformed", "no_route", "protocol"} <= dropped


async def test_a_frame_dropped_just_before_the_end_is_recorded(machine: Machine) -> None:
    """A raw frame that is a command's last act is dropped by the ring and recorded with its agent."""
    (machine.workdir / "techniques.py").write_bytes(TECHNIQUES.read_bytes())
    await machine.world.reset()
    done = await machine.python("import techniques; techniques.packet_socket_frame()", *AS_ROOT)
    dropped = [flow for flow in done.flows if flow.get("hook") == "ring"]

    assert done.code == 0, done.err
    assert [(flow["reason"], flow["address"], flow["port"]) for flow in dropped] == [("no_route", "203.0.113.66", 5000)]
    assert dropped[0]["agent"]
    assert await machine.world.packets() == []


def _expected(packet: dict[str, object]) -> bool:
    """The proxy's own connections to the allowed origin, and the gate's questions."""
    return packet.get("dst") in {"198.51.100.53", "198.51.100.10"} and packet.get("dport") in {53, 443}
