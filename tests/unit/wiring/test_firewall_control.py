"""The firewall's switch: up once, down only when nothing lives, and honest about what runs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from clawker_cp.errors import ClawkerError, Conflict, InvalidInput, Unavailable, Unsupported
from clawker_cp.firewall.changes import Applied, Progress
from clawker_cp.firewall.merge import AddStatus, RemoveStatus
from clawker_cp.firewall.plan import Topology
from clawker_cp.firewall.rulebook import RuleBook
from clawker_cp.firewall.rules import Problem, Rule
from clawker_cp.rpc.admin import FirewallAddresses
from clawker_cp.wiring.firewall_control import FirewallControl, gate_answers

ADDRESSES = FirewallAddresses("198.51.100.1", "198.51.100.1", "host:clawker0", "198.51.100.0/24")


class Mender:
    """A kernel side that somebody damages beyond repair, or not."""

    def __init__(self) -> None:
        self.left: list[str] = []

    def faults(self) -> Sequence[str]:
        return self.left

    def mend(self) -> Sequence[str]:
        return self.left


class Host:
    """Reconciler, kernel, proxy, authority and agents in one, with a journal."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.names: list[str] = []
        self.running = False
        self.healthy = True
        self.refuse: ClawkerError | None = None
        self.rules: tuple[Rule, ...] = ()
        self.topology = Topology()
        self.readable = True
        self.version = 1
        self.stuck: asyncio.Event | None = None
        self.ended = asyncio.Event()
        self.enrolled = 0
        self.mender = Mender()
        self.unsupported = ""
        self.lost = ""
        self.control = FirewallControl(
            self, self, self, self, RuleBook(self), self,
            load=self._load, running=self._running_names, gate_answers=self._answers,
            publish_ca=lambda: self.told.append("publish"), take_over=self._take_over, addresses=ADDRESSES,
            enrol_all=self._enrol_all,
        )  # fmt: skip

    async def _running_names(self) -> list[str]:
        return self.names

    async def _enrol_all(self) -> None:
        self.enrolled += 1

    async def _take_over(self) -> None:
        self.told.append("take over")

    async def _load(self) -> None:
        if self.unsupported:
            raise Unsupported(self.unsupported, feature="bpffs", hint="mount it")
        self.told.append("load")

    async def _answers(self) -> bool:
        return self.healthy

    async def perform(self, act: Callable[[], Awaitable[Any]]) -> Any:
        if self.stuck is not None:
            await self.stuck.wait()
        return await act()

    async def start(self) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.told.append("start")
        self.running = True

    async def stop(self) -> None:
        self.told.append("stop")
        self.running = False
        self.ended.set()

    async def supervise(self) -> None:
        self.told.append("supervise")
        await self.ended.wait()
        self.ended.clear()

    async def is_healthy(self) -> bool:
        return self.healthy

    def flush(self) -> None:
        self.told.append("flush")

    def open(self) -> None:
        self.told.append("open")

    def rotate(self) -> None:
        self.told.append("rotate")

    async def reconcile(self) -> Applied:
        self.told.append("reconcile")
        return Applied(self.version, live=self.running)

    async def reload(self) -> Applied:
        return Applied(self.version, live=self.running)

    def statistics(self) -> dict[str, int]:
        return {"rules": len(self.rules), "routes": 5}

    def policy_of(self, key: str, /) -> int:
        return 1

    async def change_stored(
        self, change: Callable[[Sequence[Rule]], Sequence[Rule]], progress: Progress | None = None
    ) -> Applied:
        rules = tuple(change(self.rules))
        self.version += rules != self.rules
        self.rules = rules
        return Applied(self.version, live=self.running)

    async def judge_stored(self, change: Callable[[Sequence[Rule]], Sequence[Rule]]) -> list[Problem]:
        return []

    async def start_over(self) -> Applied:
        return Applied(self.version, live=self.running)

    async def enable(self, container_id: str) -> None:
        self.told.append(f"enable {container_id}")

    async def disable(self, container_id: str) -> None:
        self.told.append(f"disable {container_id}")

    async def bypass(self, container_id: str, seconds: int) -> None:
        self.told.append(f"bypass {container_id} {seconds}")


async def test_init_brings_everything_up_once() -> None:
    """Programs first, then the policy; a second call finds it up and says the same."""
    host = Host()
    assert await host.control.init(limit_s=5) == ADDRESSES
    assert await host.control.init(limit_s=5) == ADDRESSES
    assert host.told == ["load", "start"] and host.control.up
    assert host.enrolled == 2


async def test_a_start_that_fails_leaves_it_off() -> None:
    """The refusal is passed on, and agents are not let in."""
    host = Host()
    host.refuse = Unavailable("Envoy ended", code="STACK_UNHEALTHY")
    with pytest.raises(Unavailable, match="Envoy ended"):
        await host.control.init(limit_s=5)
    with pytest.raises(Conflict) as refused:
        host.control.require_up()
    assert refused.value.code == "FIREWALL_NOT_INITIALIZED"


@pytest.mark.parametrize("verb", ["enable", "bypass"])
async def test_agents_are_not_touched_while_it_is_off(verb: str) -> None:
    """Enable and Bypass say that the firewall was never initialised; Disable is always answered."""
    host = Host()
    with pytest.raises(Conflict) as refused:
        await getattr(host.control, verb)("c", *([5] if verb == "bypass" else []))
    assert refused.value.code == "FIREWALL_NOT_INITIALIZED"
    await host.control.disable("c")
    assert host.told == ["disable c"]


async def test_nothing_is_opened_while_agents_cannot_be_judged() -> None:
    """With links that cannot be put back agents are neither enrolled nor bypassed; once they are, all goes on."""
    host = Host()
    await host.control.init(limit_s=5)
    host.mender.left = ["the parent is not judged by clawker_connect4"]
    await host.control.guard.mend()
    for ask in (host.control.enable("a"), host.control.bypass("a", 5), host.control.sync_routes(limit_s=5)):
        with pytest.raises(Unavailable, match="not judged by clawker_connect4") as refused:
            await ask
        assert refused.value.code == "ENFORCEMENT_UNAVAILABLE" and refused.value.hint
    host.mender.left = []
    await host.control.guard.mend()
    await host.control.enable("a")
    assert host.told[2:] == ["enable a"]


async def test_a_host_that_cannot_enforce_now_is_no_end() -> None:
    """Turning it on where the programs cannot be loaded is refused with what to do, and works once they can."""
    host = Host()
    host.unsupported = "cannot use /sys/fs/bpf/clawker for pins"
    with pytest.raises(Unavailable, match="for pins") as refused:
        await host.control.init(limit_s=5)
    assert (refused.value.code, refused.value.hint) == ("ENFORCEMENT_UNAVAILABLE", "mount it")
    assert not host.control.up
    host.unsupported = ""
    assert await host.control.init(limit_s=5) == ADDRESSES


async def test_up_again_says_that_the_proxy_is_lost() -> None:
    """While a proxy that ended cannot be brought back, turning the firewall on is no success; then it is again."""
    host = Host()
    await host.control.init(limit_s=5)
    host.lost = "Envoy ended at start: no such file"
    with pytest.raises(ClawkerError, match="no such file") as refused:
        await host.control.init(limit_s=5)
    assert refused.value.code == "ENVOY_RESTART" and host.control.up
    host.lost = ""
    assert await host.control.init(limit_s=5) == ADDRESSES


async def test_it_stays_up_while_anything_runs() -> None:
    """Up to ten names are told, and nothing is stopped."""
    host = Host()
    await host.control.init(limit_s=5)
    host.names = [f"clawker.a{number:02}" for number in range(12)]
    with pytest.raises(Conflict) as refused:
        await host.control.remove(limit_s=5)
    assert refused.value.code == "AGENTS_RUNNING"
    assert "12 agents are running" in refused.value.message and "and 2 more" in refused.value.message
    assert "clawker.a09" in refused.value.message and "clawker.a10" not in refused.value.message
    assert host.control.up and host.told == ["load", "start"]


async def test_down_and_up_again() -> None:
    """Proxy first, then the programs; rules can be changed meanwhile, and are not live."""
    host = Host()
    await host.control.init(limit_s=5)
    await host.control.remove(limit_s=5)
    assert host.told[2:] == ["stop", "flush"] and not host.control.up
    statuses, live = await host.control.add_rules([Rule("x.example")], limit_s=5)
    assert statuses == [AddStatus.ADDED] and live is False
    with pytest.raises(Conflict):
        await host.control.sync_routes(limit_s=5)
    await host.control.remove(limit_s=5)
    await host.control.init(limit_s=5)
    assert host.told[4:] == ["load", "start"]
    assert await host.control.sync_routes(limit_s=5) == 5


async def test_the_proxy_is_kept_running_over_down_and_up() -> None:
    """Supervision pauses while the firewall is off and goes on when it is back."""
    host = Host()
    async with asyncio.TaskGroup() as group:
        keeping = group.create_task(host.control.supervise_proxy())
        for _ in range(2):
            await host.control.init(limit_s=5)
            while host.told[-1] != "supervise":
                await asyncio.sleep(0)
            await host.control.remove(limit_s=5)
        keeping.cancel()
    assert host.told.count("supervise") == 2


async def test_no_change_is_not_said_to_be_enforced() -> None:
    """The flag is true only for an effective change that the data plane has."""
    host = Host()
    await host.control.init(limit_s=5)
    assert await host.control.add_rules([Rule("x.example")], limit_s=5) == ([AddStatus.ADDED], True)
    assert await host.control.add_rules([Rule("x.example")], limit_s=5) == ([AddStatus.UNCHANGED], False)
    assert await host.control.remove_rule("y.example", "", "", "", everything=False, limit_s=5) == (
        RemoveStatus.NOT_FOUND,
        False,
    )
    assert await host.control.remove_rule("", "", "", "", everything=True, limit_s=5) == (RemoveStatus.REMOVED, True)


async def test_status_is_what_was_probed() -> None:
    """A running proxy that does not answer is not healthy, and off is neither."""
    host = Host()
    assert not (await host.control.status()).running
    await host.control.init(limit_s=5)
    state = await host.control.status()
    assert state.running and state.proxy_healthy and state.dns_healthy and state.addresses == ADDRESSES
    sick = Host()
    await sick.control.init(limit_s=5)
    sick.healthy = False
    state = await sick.control.status()
    assert not state.running and not state.proxy_healthy and not state.dns_healthy


async def test_rotating_gives_agents_the_new_ca_before_leaves_are_pushed() -> None:
    """Rotate, publish, then reconcile."""
    host = Host()
    await host.control.init(limit_s=5)
    assert await host.control.rotate_ca(limit_s=5) is True
    assert host.told[2:] == ["rotate", "publish", "reconcile"]


async def test_the_ca_is_read_again_in_its_turn_among_the_changes() -> None:
    """While a change mints leaves or rotates it, a reload waits; then it reads, and listeners take over."""
    host = Host()
    host.stuck = asyncio.Event()
    with pytest.raises(Unavailable):
        await host.control.reload(limit_s=0.01)
    assert host.told == []

    host.stuck.set()
    await host.control.reload(limit_s=5)
    assert host.told == ["open", "take over"]


async def test_a_wait_that_is_too_long_ends_with_its_code() -> None:
    """The released command line knows the code; the work goes on."""
    host = Host()
    host.stuck = asyncio.Event()
    with pytest.raises(Unavailable) as late:
        await host.control.init(limit_s=0.01)
    assert late.value.code == "STACK_UNHEALTHY"


async def test_hostnames_are_resolved_by_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the hosts file is found, garbage is refused, a failure and too long a wait are told as such."""
    host = Host()
    assert "127.0.0.1" in await host.control.resolve_hostname("localhost.")
    for bad in (" ", "a b", "x" * 300, "\n"):
        with pytest.raises(InvalidInput):
            await host.control.resolve_hostname(bad)
    # What cannot be a name in DNS is not asked about.
    with pytest.raises(ClawkerError, match="was not resolved: .*label") as failed:
        await host.control.resolve_hostname("x" * 64 + ".example")
    monkeypatch.setattr("clawker_cp.wiring.firewall_control.RESOLVE_LIMIT_S", 0)
    with pytest.raises(ClawkerError, match="localhost was not resolved: no answer within 0 s") as late:
        await host.control.resolve_hostname("localhost")
    assert failed.value.code == late.value.code == "RESOLVE_FAILED"


@pytest.mark.root
async def test_the_gate_answers_or_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any reply to the question is an answer; silence and a closed port are none."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.153", 53))
    loop = asyncio.get_running_loop()

    async def refuse() -> None:
        query, peer = await loop.sock_recvfrom(sock, 512)
        await loop.sock_sendto(sock, query[:2] + b"\x80\x05", peer)

    async with asyncio.TaskGroup() as group:
        group.create_task(refuse())
        assert await gate_answers("127.0.0.153")
    assert not await gate_answers("127.0.0.153", limit_s=0.05)
    sock.close()
    assert not await gate_answers("127.0.0.153")
