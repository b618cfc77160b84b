"""AdminService over a firewall domain that notes what it is asked: what is checked, passed on and filled in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from clawker_cp._proto.clawker.admin.v1 import admin_pb2 as A
from clawker_cp.agents.registry import RegisteredAgent
from clawker_cp.errors import InvalidInput, Unavailable
from clawker_cp.firewall.merge import AddStatus, RemoveStatus
from clawker_cp.firewall.rules import Rule
from clawker_cp.rpc import admin as module
from clawker_cp.rpc.admin import AdminServicer, FirewallAddresses, FirewallState, new_admin_server

ADDRESSES = FirewallAddresses("192.0.2.1", "192.0.2.2", "host:clawker0", "192.0.2.0/24")


class Domain:
    """A firewall, a registry and a start; `stuck` verbs on one agent never end."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.stuck = False
        self.failure = ""

    async def init(self, *, limit_s: float) -> FirewallAddresses:
        self.asked.append(("init", limit_s))
        return ADDRESSES

    async def remove(self, *, limit_s: float) -> None:
        self.asked.append(("remove", limit_s))

    async def enable(self, container_id: str) -> None:
        self.asked.append(("enable", container_id))
        if self.stuck:
            await asyncio.Event().wait()

    async def disable(self, container_id: str) -> None:
        self.asked.append(("disable", container_id))

    async def bypass(self, container_id: str, seconds: int) -> None:
        self.asked.append(("bypass", container_id, seconds))

    async def add_rules(self, rules: Sequence[Rule], *, limit_s: float) -> tuple[list[AddStatus], bool]:
        self.asked.append(("add", [rule.dst for rule in rules], limit_s))
        return [AddStatus.ADDED, AddStatus.UNCHANGED], True

    async def remove_rule(
        self, dst: str, proto: str, port: str, path: str, *, everything: bool, limit_s: float
    ) -> tuple[RemoveStatus, bool]:
        self.asked.append(("remove rule", dst, proto, port, path, everything))
        return RemoveStatus.PATH_REMOVED, False

    def list_rules(self) -> list[Rule]:
        return [Rule("api.example.com", "https", "443")]

    async def reload(self, *, limit_s: float) -> bool:
        self.asked.append(("reload", limit_s))
        return True

    async def status(self) -> FirewallState:
        return FirewallState(running=True, proxy_healthy=True, dns_healthy=False, rules=3, addresses=ADDRESSES)

    async def rotate_ca(self, *, limit_s: float) -> bool:
        return True

    async def sync_routes(self, *, limit_s: float) -> int:
        return 5

    async def resolve_hostname(self, hostname: str) -> list[str]:
        return ["192.0.2.9"]

    def snapshot(self) -> list[RegisteredAgent]:
        return [RegisteredAgent("ab" * 32, "c1", "dev", "shop", 10, 20)]

    async def wait_outcome(self) -> str:
        return self.failure


def context(left: float | None = None) -> Any:
    """A call with so many seconds left."""
    return SimpleNamespace(time_remaining=lambda: left)


def made() -> tuple[Domain, AdminServicer]:
    domain = Domain()
    return domain, new_admin_server(domain, domain, start=domain)


def test_a_wiring_without_its_parts_is_a_programming_error() -> None:
    """This process is the registry's only writer."""
    for parts in ((None, Domain()), (Domain(), None)):
        with pytest.raises(TypeError):
            new_admin_server(*parts)


async def test_requests_are_passed_on_with_the_time_they_have() -> None:
    """12 s, 180 s for Init and Reload, and half a second less than the caller waits."""
    domain, server = made()
    found = await server.FirewallInit(A.FirewallInitRequest(), context())
    assert (found.envoy_ip, found.coredns_ip, found.network_id) == ("192.0.2.1", "192.0.2.2", "host:clawker0")
    await server.FirewallRemove(A.FirewallRemoveRequest(), context(5.0))
    await server.FirewallEnable(A.FirewallEnableRequest(container_id="c1"), context())
    await server.FirewallDisable(A.FirewallDisableRequest(container_id="c1"), context())
    await server.FirewallBypass(A.FirewallBypassRequest(container_id="c1", timeout_seconds=7), context())
    rules = [A.EgressRule(dst="a.example.com"), A.EgressRule(dst="b.example.com")]
    added = await server.FirewallAddRules(A.FirewallAddRulesRequest(rules=rules), context())
    removed = await server.FirewallRemoveRule(A.FirewallRemoveRuleRequest(dst="x", path="/p"), context())
    assert (await server.FirewallReload(A.FirewallReloadRequest(), context())).stack_restarted

    assert domain.asked == [
        ("init", 180.0), ("remove", 4.5), ("enable", "c1"), ("disable", "c1"), ("bypass", "c1", 7),
        ("add", ["a.example.com", "b.example.com"], 12.0), ("remove rule", "x", "", "", "/p", False),
        ("reload", 180.0),
    ]  # fmt: skip
    assert (list(added.statuses), added.stack_restarted) == ([1, 3], True)
    assert (removed.status, removed.stack_restarted) == (2, False)


async def test_answers_are_filled_in_whole() -> None:
    """Rules, status, routes, addresses, agents and the clock."""
    _domain, server = made()
    (rule,) = (await server.FirewallListRules(A.FirewallListRulesRequest(), context())).rules
    assert (rule.dst, rule.proto, rule.port) == ("api.example.com", "https", "443")
    status = await server.FirewallStatus(A.FirewallStatusRequest(), context())
    assert (status.running, status.envoy_health, status.coredns_health) == (True, True, False)
    assert (status.rule_count, status.cidr, status.envoy_ip) == (3, "192.0.2.0/24", "192.0.2.1")
    assert (await server.FirewallRotateCA(A.FirewallRotateCARequest(), context())).stack_restarted
    assert (await server.FirewallSyncRoutes(A.FirewallSyncRoutesRequest(), context())).applied == 5
    asked = A.FirewallResolveHostnameRequest(hostname="a.example.com")
    assert list((await server.FirewallResolveHostname(asked, context())).addresses) == ["192.0.2.9"]
    (agent,) = (await server.ListAgents(A.ListAgentsRequest(), context())).agents
    assert agent == A.Agent(
        agent_name="dev", container_id="c1", cert_thumbprint="ab" * 32, registered_at_unix=10, last_seen_unix=20,
        project="shop",
    )  # fmt: skip
    assert (await server.GetSystemTime(A.GetSystemTimeRequest(), context())).unix_nanos > 0


async def test_what_cannot_be_meant_is_refused() -> None:
    """`all` with anything else, and no name to resolve."""
    _domain, server = made()
    for field in ("dst", "proto", "port", "path"):
        with pytest.raises(InvalidInput, match="all"):
            await server.FirewallRemoveRule(A.FirewallRemoveRuleRequest(all=True, **{field: "x"}), context())
    with pytest.raises(InvalidInput, match="hostname"):
        await server.FirewallResolveHostname(A.FirewallResolveHostnameRequest(), context())


async def test_a_verb_that_is_stuck_is_answered_before_its_caller_leaves() -> None:
    """With what happened: it was accepted and goes on."""
    domain, server = made()
    domain.stuck = True
    with pytest.raises(Unavailable, match="accepted") as slow:
        await server.FirewallEnable(A.FirewallEnableRequest(container_id="c1"), context(0.52))
    assert (slow.value.code, slow.value.details) == ("STACK_UNHEALTHY", {"saved": "true"})


async def test_who_watches_the_start_hears_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing when all is well or nobody knows; else why not."""
    monkeypatch.setattr(module, "SOS_KEPT_S", 0.0)
    domain, server = made()
    request = A.WatchSOSRequest()
    assert [one async for one in server.WatchSOS(request, context())] == []
    assert [one async for one in new_admin_server(domain, domain).WatchSOS(request, context())] == []
    domain.failure = "port taken"
    assert [one.message async for one in server.WatchSOS(request, context())] == ["port taken"]
