"""What the server says of itself: each component's health in words an operator can act on, and what metrics read."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from clawker_cp.agents.database import Database
from clawker_cp.agents.registry import RegisteredAgent, Registry
from clawker_cp.agents.roster import EnrolledAgent, Roster
from clawker_cp.config import EnvoySettings, FirewallSettings, Settings
from clawker_cp.engines.base import HostFeature
from clawker_cp.pki.tree import SERVER, AuthTree
from clawker_cp.runtime.health import Health, HealthRegistry
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import Flow
from clawker_cp.wiring.health_keeper import HealthKeeper
from clawker_cp.wiring.server_status import Implementations, ServerStatus, implementations

NOW = 1_700_000_000.0
ONE = EnrolledAgent("a" * 64, "shop", "dev", "198.51.100.7", 7, 1)
TWO = EnrolledAgent("b" * 64, "shop", "ops", "198.51.100.8", 8, 2, quarantined=True)
# Of this process alone: other suites may run on the machine.
GATE = f"127.{os.getpid() >> 16 & 0xFF | 0x80}.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}"
CRITICAL = ["enforcement", "envoy", "dns", "authority"]


class Parts:
    """Policy, kernel, proxy and engine in one, each as well as the test says."""

    def __init__(self) -> None:
        self.healthy = self.readable = self.loaded = self.proxy_answers = self.authority = True
        self.version = 41
        self.restarts = 0
        self.failed: dict[str, str] = {}
        self.ways: dict[str, list[str]] = {}
        self.rows = {7, 8}
        self.up = True
        self.unjudged = self.engine = self.coredns = ""

    def statistics(self) -> dict[str, int]:
        return {"policies": 2, "rules": 5, "agents": 2, "rows": 9, "names": 3}

    async def is_healthy(self) -> bool:
        return self.proxy_answers

    def failures(self) -> Mapping[str, str]:
        return self.failed

    def exposures(self, agent_id: str) -> Sequence[str]:
        return self.ways.get(agent_id, ())

    async def authority_answers(self) -> bool:
        return self.authority

    async def engine_answers(self) -> str:
        return self.engine

    async def what_is_unjudged(self) -> str:
        return self.unjudged


class World:
    """A server's status over real files, a real database and a real health registry."""

    def __init__(self, directory: Path, database: Database) -> None:
        self.parts = parts = Parts()
        self.roster = Roster()
        self.tree = AuthTree(directory / "auth")
        self.registry = Registry(database)
        self.flows = FlowLog(directory / "flows.jsonl")
        self.health = HealthRegistry()
        self.wall = NOW
        self.status = ServerStatus(
            parts, parts, parts, self.roster, self.tree, self.health, (HostFeature("net", True, True, "there"),),
            self.registry, self.flows,
            engine="host", dns_address=GATE, up=lambda: parts.up, is_ready=lambda: True,
            what_runs=Implementations("embedded", envoy_version="1.40"), authority_answers=parts.authority_answers,
            engine_answers=parts.engine_answers, behind_gate=lambda: parts.coredns,
            unjudged=parts.what_is_unjudged, enrolled=lambda: parts.rows, side=parts, max_agents=64,
            wall=lambda: self.wall,
        )  # fmt: skip
        self.keeper = HealthKeeper(self.health, self.status.checks())

    async def says(self, name: str) -> tuple[Health, str]:
        """One round of questions, and what it found of a component."""
        await self.keeper.ask_all()
        found = self.health.component(name)
        assert found is not None
        return found.health, found.detail


class Refusing(asyncio.DatagramProtocol):
    """A gate: strangers get REFUSED, which is an answer."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data[:2] + b"\x80\x05", addr)


@pytest_asyncio.fixture
async def gate() -> AsyncIterator[asyncio.DatagramTransport]:
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Refusing, (GATE, 53))
    yield transport
    transport.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    database = Database(tmp_path / "cp.db")
    database.open()
    made = World(tmp_path, database)
    made.tree.ensure()
    made.wall = dt.datetime.now(dt.UTC).timestamp()
    yield made
    database.close()


@pytest.mark.root
@pytest.mark.usefixtures("gate")
async def test_everything_well_is_all_components_of_the_contract(world: World) -> None:
    """Thirteen components; what is not offered is off, and four take part in /healthz."""
    await world.keeper.ask_all()
    said = {one.name: one.health for one in world.health.components()}

    assert [name for name, health in said.items() if health is Health.OFF] == ["telemetry", "fleet"]
    assert {health for name, health in said.items() if name not in {"telemetry", "fleet"}} == {Health.OK}
    assert [one.name for one in world.health.components() if one.critical] == CRITICAL
    assert len(said) == 13


async def test_while_the_firewall_is_off_nothing_of_it_is_missed(world: World) -> None:
    """Kernel, proxy, gate and agents are off, not failed, though none of them would answer; /healthz is green."""
    parts = world.parts
    parts.up = parts.proxy_answers = False
    parts.unjudged, parts.rows = "no program is attached", set()
    world.roster.put(ONE)
    off = [name for name in ("enforcement", "envoy", "dns", "agents") if (await world.says(name))[0] is Health.OFF]

    assert off == ["enforcement", "envoy", "dns", "agents"]
    assert [await probe() for _, probe in world.status.probes()] == [True, True, True]


@pytest.mark.root
@pytest.mark.usefixtures("gate")
async def test_what_does_not_enforce_is_red_with_its_reason(world: World) -> None:
    """Both in the component and in what /healthz asks."""
    world.parts.unjudged = "connect4 of the agents' parent is not ours"

    assert await world.says("enforcement") == (Health.FAILED, "connect4 of the agents' parent is not ours")
    assert [name for name, probe in world.status.probes() if not await probe()] == ["enforcement"]


async def test_an_agent_that_was_not_enrolled_is_named(world: World) -> None:
    """Without a row in the kernel it is denied everything; a failure that has a cause is told before that."""
    world.roster.put(ONE)
    world.roster.put(TWO)
    assert await world.says("agents") == (Health.OK, "2 running")
    world.parts.rows = {7}
    assert await world.says("agents") == (
        Health.DEGRADED, "denied everything, for they are not enrolled: agent:shop/ops",
    )  # fmt: skip
    world.parts.failed = {"c" * 64: "no address"}
    health, detail = await world.says("agents")
    assert health is Health.DEGRADED and detail.startswith("1 denied") and "cccccccccccc: no address" in detail


async def test_an_exposed_agent_is_named_with_its_ways_out(world: World) -> None:
    """What the owner gave it degrades the component, and only agents that have some are counted (R34)."""
    world.roster.put(ONE)
    world.roster.put(TWO)
    world.parts.ways = {ONE.id: ["privileged", "mount:/etc", "host_pid", "device:/dev/kvm"]}

    assert await world.says("agents") == (
        Health.DEGRADED, "1 of 2 exposed by their owner: agent:shop/dev: privileged, mount:/etc, host_pid",
    )  # fmt: skip


async def test_rules_that_cannot_be_read_outweigh_a_change_that_waits(world: World) -> None:
    """A change that is accepted and not live is yellow; unreadable files are red, and the old policy stays (R21)."""
    world.parts.healthy = False
    assert await world.says("rules") == (Health.DEGRADED, "an accepted change is not live yet")
    world.parts.readable = False
    health, detail = await world.says("rules")
    assert health is Health.FAILED and "the running policy stays" in detail


async def test_a_certificate_is_told_of_a_month_before_its_end(world: World) -> None:
    """Until then the component is well; the ends of all are there for metrics, by file."""
    assert (await world.says("pki"))[0] is Health.OK
    ends = world.status.certificate_ends()
    leaf = world.tree.path(SERVER.certificate)
    assert {str(Path(leaf.parent.name) / leaf.name), "ca/ca.pem"} <= set(ends)
    first = dt.datetime.fromtimestamp(min(ends.values()), dt.UTC)
    world.wall = (first - dt.timedelta(days=29)).timestamp()
    assert await world.says("pki") == (Health.DEGRADED, f"a certificate ends on {first:%Y-%m-%d}")


async def test_a_broken_key_is_red_and_named(world: World) -> None:
    """Which pair does not fit, and what is wrong with it."""
    world.tree.path(SERVER.key).write_bytes(b"no key")
    assert await world.says("pki") == (Health.FAILED, "server.pem the key is not an unencrypted PEM key")


async def test_restarts_of_the_proxy_are_counted_once_each(world: World) -> None:
    """However many happened between two questions."""
    counted = []
    for world.parts.restarts in (3, 3, 4):
        await world.says("envoy")
        found = world.health.component("envoy")
        assert found is not None
        counted.append(found.restarts)
    assert counted == [3, 3, 4]


@pytest.mark.root
async def test_dns_is_the_gate_first_and_coredns_behind_it(world: World, gate: asyncio.DatagramTransport) -> None:
    """A gate that answers over a CoreDNS that does not is yellow; a silent gate is red whatever is behind it."""
    world.parts.coredns = "CoreDNS does not answer"
    assert await world.says("dns") == (Health.DEGRADED, "CoreDNS does not answer")
    gate.close()
    await asyncio.sleep(0)  # a transport closes its socket one turn later
    assert await world.says("dns") == (Health.FAILED, "does not answer")
    assert [name for name, probe in world.status.probes() if not await probe()] == ["dns"]


async def test_engine_and_authority_are_as_their_answers(world: World) -> None:
    """The engine's own words; an authority that says no has failed also while the firewall is off."""
    world.parts.engine, world.parts.authority, world.parts.up = "the socket is gone", False, False
    assert await world.says("engine") == (Health.FAILED, "the socket is gone")
    assert await world.says("authority") == (Health.FAILED, "does not answer")


async def test_records_and_registrations_are_counted(world: World) -> None:
    """What was taken and what the kernel lost of it; how many agents ever attested who they are."""
    world.flows.add([Flow(event_id="k-1-1", container_id=ONE.id, lost_before=4), Flow(event_id="k-1-2")])
    world.registry.add(RegisteredAgent("ab" * 32, ONE.id, "dev", "shop", 1, 50))
    assert await world.says("flows") == (Health.OK, "2 taken, 4 lost")
    assert await world.says("registry") == (Health.OK, "1 registered")


def test_the_status_is_of_this_moment(world: World) -> None:
    """Versions, counts and agents as they are; the start is when it was made."""
    world.roster.put(ONE)
    world.parts.version = 42
    said = world.status.status()

    assert (said.version, said.ready, said.started_at_unix) == (version("clawker-cp"), True, int(NOW))
    assert (said.policy_version, said.policies, said.rules) == (42, 2, 5)
    assert (said.engine, said.stack, said.agents) == ("host", "embedded", (ONE,))
    assert [one.name for one in said.host] == ["net"]


def test_metrics_count_agents_by_state(world: World) -> None:
    """Every agent is enrolled; quarantined and bypassed are some of those."""
    world.roster.put(ONE)
    world.roster.put(TWO)
    world.roster.put(replace(ONE, id="c" * 64, bypass_until_ns=5, clock_ns=lambda: 4))

    assert world.status.agent_states() == {"enrolled": 3, "quarantined": 1, "bypassed": 1}
    assert world.status.policy_numbers()["policy_version"] == 41


def test_sizes_of_tables_are_there_while_they_are(world: World) -> None:
    """Rows and room of each table that is filled from here; none while nothing is loaded."""
    assert world.status.map_sizes() == {
        "container_map": (2, 64), "dns_cache": (3, 262_144), "route_map": (9, 262_144),
    }  # fmt: skip
    world.parts.loaded = False
    assert world.status.map_sizes() == {}


@pytest.mark.parametrize(
    ("settings", "stack", "expected"),
    [
        (Settings(), "embedded", ("cgroup-ebpf + tc-nft host ring", "wheel")),
        (Settings(envoy=EnvoySettings(binary="/usr/bin/envoy")), "embedded", (..., "binary")),
        (Settings(envoy=EnvoySettings(binary="/usr/bin/envoy")), "container", (..., "container")),
        (Settings(firewall=FirewallSettings(host_ring=False)), "container", ("cgroup-ebpf", "container")),
    ],
)
def test_which_implementations_run(settings: Settings, stack: str, expected: tuple[object, str]) -> None:
    """Read off the settings; the proxy's version is known of the one that comes with us alone (contract 10.3)."""
    found = implementations(settings, "hydra", stack)

    assert found.authority == "hydra" and found.envoy == expected[1]
    assert expected[0] is ... or found.enforcement == expected[0]
    assert bool(found.envoy_version) == (found.envoy == "wheel")
