"""
What the ring is told of agents that are adopted together; the rest is held with real kernels in tests/e2e and escape.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.ebpf import Manager
from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.docker.engine import DockerEngine
from clawker_cp.engines.docker_client import DockerClient
from clawker_cp.engines.host.direct import Admitted
from clawker_cp.telemetry.connections import Connections
from clawker_cp.testing.plan_world import build, rule
from clawker_cp.wiring.enforcement import Enforcement

NETWORK = AgentNetwork("n", "10.231.96.0/20", "10.231.96.1", "br-x", "10.231.96.1", "10.231.96.1", "10.231.96.1")


class Ring:
    """A ring that remembers what it was told, one entry for each transaction."""

    def __init__(self) -> None:
        self.told: list[dict[str, Admitted]] = []

    async def admit_each(self, wanted: Mapping[str, Admitted]) -> None:
        self.told.append(dict(wanted))

    async def admit_all(self, address: str, seconds: float | None) -> None:
        raise AssertionError(address)

    async def end_all(self, address: str) -> None:
        raise AssertionError(address)


def agent(number: int, *, quarantined: bool = False) -> EnrolledAgent:
    name, address = f"a{number}", f"10.231.96.{number}"
    return EnrolledAgent(name, "p", name, address, number, policy=1, quarantined=quarantined)


async def test_agents_that_are_adopted_together_are_one_transaction_of_the_ring(tmp_path: Path) -> None:
    """Each has the listeners of its policy, one in quarantine has none, and for nobody nothing is asked."""
    plan, ring = build(rule("https://a.example.com")).plan, Ring()
    engine = DockerEngine(DockerClient(f"unix://{tmp_path}/none"), NETWORK)
    enforcement = Enforcement(
        Manager(tmp_path / "pins"), engine, ring, Roster(), Connections(), plan=lambda: plan
    )  # fmt: skip
    await enforcement.admit_coming([])
    nothing = list(ring.told)
    await enforcement.admit_coming([agent(5), agent(6), agent(7, quarantined=True)])
    (told,) = ring.told

    assert nothing == []
    assert set(told) == {"10.231.96.5", "10.231.96.6", "10.231.96.7"}
    assert told["10.231.96.5"] == told["10.231.96.6"] and told["10.231.96.5"].listeners
    assert told["10.231.96.7"] == Admitted()
