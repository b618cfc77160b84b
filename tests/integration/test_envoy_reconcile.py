"""
Rules on their way into force: store, Envoy, kernel and gate in the order that never opens by accident.

Envoy and files are real; the kernel side records what it is told, since the order is what counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from clawker_cp.errors import CapacityExceeded, ClawkerError, Unavailable
from clawker_cp.firewall import merge
from clawker_cp.firewall.allocation_files import AllocationFiles
from clawker_cp.firewall.changes import Change
from clawker_cp.firewall.plan import Plan, Topology
from clawker_cp.firewall.reconcile import Reconciler
from clawker_cp.firewall.resolving import PolicyNames
from clawker_cp.firewall.rules import RuleInvalid
from clawker_cp.firewall.store import RuleStore
from clawker_cp.testing.plan_world import deny, rule
from clawker_cp.testing.proxy_world import OUTSIDE, PROXY, ProxyWorld, run_in_namespace

pytestmark = [pytest.mark.root, pytest.mark.envoy, pytest.mark.slow]

AGENT = "agent:p/a"


class KernelRecord:
    """Stands in for the maps: remembers what was written, in order with everything else."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.routes: frozenset[Any] = frozenset()
        self.failing = 0

    def sync_routes(self, routes: Any, cidrs: Any, ports: Any, /) -> None:
        if self.failing:
            self.failing -= 1
            raise ClawkerError("the map is full", code="ROUTE_SYNC")
        self.routes = frozenset(routes)
        self.journal.append("kernel")


class AgentsRecord:
    """Stands in for the running agents."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.policies: dict[str, int] = {}
        self.changes: list[Change] = []

    async def set_policies(self, policies: Mapping[str, int], /) -> None:
        self.policies |= policies
        self.journal.append("agents")

    async def admit(self, plan: Plan, /) -> None:
        self.admitted = plan

    async def cut(self, change: Change, /) -> int:
        self.changes.append(change)
        self.journal.append("cut")
        return 0


class Reconciled(ProxyWorld):
    """A proxy world driven by a reconciler."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.journal: list[str] = []
        self.kernel = KernelRecord(self.journal)
        self.agents = AgentsRecord(self.journal)
        self.names = PolicyNames()
        self.store = RuleStore(directory / "rules")
        self.wall = time.time
        self.reconciler = Reconciler(
            self.store,
            AllocationFiles(directory / "rules"),
            self.stack,
            self.kernel,
            self.agents,
            self.names,
            Topology(),
        )

    async def add(self, *rules: Any) -> Any:
        return await self.reconciler.change_stored(lambda stored: merge.add(stored, rules).rules)

    async def remove(self, dst: str, proto: str = "", port: str = "") -> Any:
        return await self.reconciler.change_stored(lambda stored: merge.remove(stored, dst, proto, port).rules)


@asynccontextmanager
async def reconciled(directory: Path) -> AsyncIterator[Reconciled]:
    """A started world whose reconciler runs."""
    world = Reconciled(directory)
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: world.view, ("127.0.0.1", world.options.resolver[1]))
    try:
        world.authority.open()
        await world.reconciler.start()
        async with asyncio.TaskGroup() as group:
            group.create_task(world.reconciler.run(), name="reconciler")
            try:
                yield world
            finally:
                world.reconciler.close()
    finally:
        await world.aclose()


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], limit_s: float = 10.0) -> None:
    """Wait until a condition holds; fails at the limit."""
    async with asyncio.timeout(limit_s):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.01)


def test_a_stored_rule_is_enforced_when_the_call_returns(tmp_path: Path) -> None:
    """Adding a rule returns with a new version, live, stored, in the kernel and resolvable."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            world.view.zone["api.example.com"] = OUTSIDE
            await world.outside.http(443, "api.example.com")

            applied = await world.add(rule("https://api.example.com"))

            assert (applied.version, applied.live) == (2, True)
            assert [one.dst for one in world.store.read().rules] == ["api.example.com"]
            assert world.names.decide(1, "api.example.com").allowed
            assert {(row.port, row.proxy_port) for row in world.kernel.routes} == {(443, 10000)}
            assert (await world.request("https://api.example.com/"))[0] == 200

    run_in_namespace(main)


def test_a_rule_that_does_not_compile_changes_nothing(tmp_path: Path) -> None:
    """Two rules that contradict each other are refused together; store, version and kernel stay."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            await world.add(rule("https://api.example.com"))
            world.journal.clear()

            with pytest.raises(RuleInvalid, match="both want this port"):
                await world.add(rule("tcp://api.example.com:443"))

            assert world.journal == []
            assert world.reconciler.version == 2
            assert len(world.store.read().rules) == 1

    run_in_namespace(main)


def test_a_refusal_by_envoy_reaches_neither_store_nor_kernel(tmp_path: Path) -> None:
    """What Envoy refuses is undone: its text is in the error, old rules still serve (R19)."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            world.view.zone["api.example.com"] = OUTSIDE
            await world.outside.http(443, "api.example.com")
            await world.add(rule("https://api.example.com"))
            taken = await asyncio.start_server(lambda r, w: None, PROXY, 10001)
            world.journal.clear()

            with pytest.raises(ClawkerError, match="Envoy refused the change") as failure:
                await world.add(rule("tcp://db.example.com:5432"))

            assert failure.value.code == "RULE_INVALID"
            assert world.journal == []
            assert [one.dst for one in world.store.read().rules] == ["api.example.com"]
            assert not world.names.decide(1, "db.example.com").allowed
            assert (await world.request("https://api.example.com/"))[0] == 200
            taken.close()
            assert (await world.add(rule("tcp://db.example.com:5432"))).live

    run_in_namespace(main)


def test_rules_of_a_run_live_as_long_as_its_agent(tmp_path: Path) -> None:
    """Ephemeral rules give the agent a policy of its own and are gone with it; the file never has them."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            number = await world.reconciler.put_ephemeral(AGENT, [{"dst": "api.example.com", "path_default": "allow"}])

            assert number == 2
            assert world.names.decide(2, "api.example.com").allowed
            assert not world.names.decide(1, "api.example.com").allowed
            assert world.store.read().rules == ()
            await world.reconciler.drop_ephemeral(AGENT)
            assert not world.names.decide(2, "api.example.com").allowed
            assert world.reconciler.plan.agents == {}

    run_in_namespace(main)


def test_an_agent_without_rules_gets_the_global_policy(tmp_path: Path) -> None:
    """Only rules make a policy: an agent without any has number 1."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            assert await world.reconciler.put_ephemeral(AGENT, []) == 1

    run_in_namespace(main)


def test_an_expired_rule_is_gone_within_a_second(tmp_path: Path) -> None:
    """A rule with an end disappears from store, gate and proxy without anybody asking."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            ends = time.time() + 1.0
            await world.add(rule("https://api.example.com", scope=AGENT, expires_at=ends))

            await until(lambda: world.store.read().rules == (), 5)

            assert time.time() - ends < 1.5
            await until(lambda: not world.names.decide(2, "api.example.com").allowed, 1)

    run_in_namespace(main)


def test_a_name_below_an_opaque_wildcard_gets_its_own_listener_before_the_answer(tmp_path: Path) -> None:
    """`prepare` returns when bytes to that very name pass, and the 65th live name is refused."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            world.view.zone["*.db.example.com"] = OUTSIDE
            await world.outside.echo(5432)
            await world.add(rule("tcp://*.db.example.com:5432"))
            asked = world.names.decide(1, "one.db.example.com")
            assert asked.concrete

            verdict = await world.names.prepare(1, "one.db.example.com", asked)

            assert verdict.identity >= 256
            assert not verdict.concrete
            (target,) = world.reconciler.plan.policies[1].opaque
            reader, writer = await asyncio.open_connection(PROXY, target.listen)
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping"
            writer.close()
            async with asyncio.TaskGroup() as group:
                for number in range(2, 65):
                    group.create_task(world.names.prepare(1, f"n{number}.db.example.com", None))
            with pytest.raises(CapacityExceeded, match="64 live names"):
                await world.names.prepare(1, "n65.db.example.com", None)
            # All of them were worked on in few steps, not one after the other.
            assert world.reconciler.version < 20

    run_in_namespace(main)


def test_a_deeper_name_below_an_inspected_wildcard_gets_a_certificate_first(tmp_path: Path) -> None:
    """a.b.example.com below *.example.com is served with a certificate that clients accept."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            world.view.zone["a.b.example.com"] = OUTSIDE
            await world.outside.http(443, "a.b.example.com")
            await world.add(rule("https://*.example.com"))
            asked = world.names.decide(1, "a.b.example.com")
            assert asked.san == "*.b.example.com"

            verdict = await world.names.prepare(1, "a.b.example.com", asked)

            assert not verdict.san
            assert (await world.request("https://a.b.example.com/"))[0] == 200

    run_in_namespace(main)


def test_closing_persists_first_and_tells_what_was_lost(tmp_path: Path) -> None:
    """A removed TCP rule: the listener closes, the change names it, the port rests."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            world.view.zone["db.example.com"] = OUTSIDE
            await world.outside.echo(5432)
            await world.add(rule("tcp://db.example.com:5432"))
            (target,) = world.reconciler.plan.policies[1].opaque
            reader, writer = await asyncio.open_connection(PROXY, target.listen)
            world.journal.clear()

            await world.remove("db.example.com", "tcp", "5432")

            assert world.journal == ["kernel", "cut"]
            assert [lost.dst for _, lost in world.agents.changes[-1].lost] == ["db.example.com"]
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            with pytest.raises(OSError):
                await asyncio.open_connection(PROXY, target.listen)

    run_in_namespace(main)


def test_a_deny_added_below_a_wildcard_holds_when_the_call_returns(tmp_path: Path) -> None:
    """The denied name stops resolving and its requests end in rule_deny at once."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            world.view.zone["*.example.com"] = OUTSIDE
            await world.outside.http(443, "*.example.com")
            await world.add(rule("https://*.example.com"))
            assert (await world.request("https://bad.example.com/"))[0] == 200

            await world.add(deny("https://bad.example.com"))

            assert not world.names.decide(1, "bad.example.com").allowed
            assert (await world.request("https://bad.example.com/"))[0] == 403
            assert (await world.request("https://good.example.com/"))[0] == 200

    run_in_namespace(main)


def test_what_the_kernel_refuses_is_tried_again(tmp_path: Path) -> None:
    """A full map leaves the change stored, not live; the next try puts it in force."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            world.kernel.failing = 1

            with pytest.raises(Unavailable, match="not in force yet") as failure:
                await world.add(rule("https://api.example.com"))

            assert failure.value.code == "ROUTE_SYNC"
            assert not world.reconciler.healthy
            assert not world.names.decide(1, "api.example.com").allowed
            await world.reconciler.reconcile()
            assert world.reconciler.healthy
            assert world.names.decide(1, "api.example.com").allowed

    run_in_namespace(main)


def test_changes_are_judged_by_envoy_while_the_stack_is_stopped(tmp_path: Path) -> None:
    """Without a running Envoy a good rule is stored only, and the version is not live."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            await world.stack.stop()

            applied = await world.add(rule("https://api.example.com/x"), rule("tcp://db.example.com:22"))

            assert not applied.live
            assert len(world.store.read().rules) == 2

    run_in_namespace(main)


def test_a_closed_reconciler_takes_nothing_more(tmp_path: Path) -> None:
    """After `close` new changes end in QUEUE_CLOSED; accepted ones still run."""

    async def main() -> None:
        async with reconciled(tmp_path) as world:
            async with asyncio.TaskGroup() as group:
                accepted = group.create_task(world.add(rule("https://api.example.com")))
                await asyncio.sleep(0)
                world.reconciler.close()
            with pytest.raises(Unavailable) as failure:
                await world.add(rule("https://b.example.com"))

            assert failure.value.code == "QUEUE_CLOSED"
            assert accepted.result().version == 2

    run_in_namespace(main)
