"""
Start and stop of the gate; what it answers is in the integration tests.
"""

from __future__ import annotations

import asyncio
import socket

import pytest

from clawker_cp.dns import Gate, GateSettings
from clawker_cp.errors import Conflict
from clawker_cp.testing.dns_world import FakeAgents, FakeKernel, FakePolicies, RecordList


def make(**changes: object) -> Gate:
    options: dict[str, object] = {"address": "127.0.0.1", "port": -1, "proxy_view_port": -1}
    return Gate(
        GateSettings(**(options | changes)),  # type: ignore[arg-type]
        agents=FakeAgents(),
        policies=FakePolicies(),
        kernel=FakeKernel(),
        records=RecordList(),
    )


def test_making_a_gate_does_nothing() -> None:
    """A gate may be made where no loop runs and no socket may be bound."""
    assert make(address="203.0.113.1", port=53).statistics().waiting == 0


async def test_stops_twice_and_frees_its_ports() -> None:
    """After `aclose` the ports are free at once; closing again is harmless."""
    async with asyncio.TaskGroup() as group:
        gate = make()
        await gate.start(group)
        await gate.aclose()
        await gate.aclose()
        again = make(port=gate.port, proxy_view_port=gate.proxy_view_port)
        await again.start(group)
        assert again.port == gate.port
        await again.aclose()


async def test_failed_start_leaves_nothing_bound() -> None:
    """If the proxy view's port is taken, the agents' port is given back."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with asyncio.TaskGroup() as group:
            gate = make(proxy_view_port=taken.getsockname()[1])
            with pytest.raises(Conflict, match=r"dns\.proxy_view_port"):
                await gate.start(group)
            with socket.socket(type=socket.SOCK_DGRAM) as free:
                free.bind(("127.0.0.1", gate.port))
