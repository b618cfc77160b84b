"""Connections over a change of policy, by the plans of both sides (R13)."""

from __future__ import annotations

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.host.sockets import SocketInfo
from clawker_cp.firewall.changes import Change
from clawker_cp.firewall.compile import Compiled
from clawker_cp.firewall.plan import TCP
from clawker_cp.telemetry.connections import Live
from clawker_cp.testing.bridge_world import GATEWAY, ON_HOST, SUBNET
from clawker_cp.testing.plan_world import build, rule
from clawker_cp.wiring.policy_move import PolicyMove, listeners

AGENT, NETWORK = "agent:p/a", AgentNetwork(id="n", subnet=SUBNET, gateway=GATEWAY, bridge="b", **ON_HOST)


def move(old: Compiled, new: Compiled) -> PolicyMove | None:
    """What the change does to agents of the global policy, or to one that comes to have its own."""
    before, after = (plan.agents.get(AGENT, 1) for plan in (old.plan, new.plan))
    return PolicyMove.of(before, after, Change(old.plan, new.plan, {}, ()), NETWORK)


def to(port: int, destination: str = NETWORK.proxy, source: int = 40000) -> SocketInfo:
    """An agent's socket."""
    return SocketInfo(TCP, "10.231.96.5", source, destination, port)


def carries(host: str, listener: int) -> dict[int, Live]:
    """What the proxy said of the socket from port 40000."""
    return {40000: Live(host, 443, True, listener)}


def test_a_change_that_takes_nothing_concerns_nobody() -> None:
    """Neither an equal plan nor another host beside the old ones; a policy that a plan does not have is no move."""
    same = build(rule("x.com"))
    port = same.plan.policies[1].egress_port
    for after in ([rule("x.com")], [rule("x.com"), rule("y.com")]):
        made = move(same, build(*after, allocations=same.allocations))
        assert made is not None and not made.concerns({}) and not made.concerns(carries("x.com", port))
    gone = move(same, build(rule("y.com"), allocations=same.allocations))
    assert gone is not None and gone.concerns({})
    assert PolicyMove.of(77, 77, Change(same.plan, same.plan, {}, ()), NETWORK) is None


def test_what_the_proxy_told_too_late_is_cut_by_the_next_change_of_any_kind() -> None:
    """A connection to a host without a rule, seen after its rule's end or not cut then, is looked for again."""
    same = build(rule("x.com"))
    port = same.plan.policies[1].egress_port
    made = move(same, build(rule("x.com"), rule("y.com"), allocations=same.allocations))
    assert made is not None and made.concerns(carries("gone.com", port))
    assert made.doomed(carries("gone.com", port))(to(port))


def test_a_host_that_lost_its_rule_loses_its_connection_on_the_shared_listener() -> None:
    """Its neighbour on the same listener stays, as does a connection of which the proxy said nothing."""
    old = build(rule("x.com"), rule("y.com"))
    new = build(rule("y.com"), allocations=old.allocations)
    made, port = move(old, new), old.plan.policies[1].egress_port
    assert made is not None
    assert made.doomed(carries("x.com", port))(to(port))
    assert not made.doomed(carries("y.com", port))(to(port))
    assert not made.doomed({})(to(port))


def test_an_unread_listener_that_is_gone_takes_its_connections_with_it() -> None:
    """The proxy need not have said a word about them."""
    old = build(rule("y.com"), rule("ssh://x.com"))
    new = build(rule("y.com"), allocations=old.allocations)
    made = move(old, new)
    (gone,) = listeners(old.plan.policies[1]) - listeners(new.plan.policies[1])
    assert made is not None and made.doomed({})(to(gone))


def test_direct_connections_are_judged_by_their_address() -> None:
    """What the new plan passes stays; loopback, IPv6 and what everybody is served are never cut here."""
    old = build(rule("tcp://203.0.113.0/24:5"))
    new = build(rule("tcp://203.0.113.7/32:5"), allocations=old.allocations)
    made = move(old, new)
    assert made is not None
    judged = {
        there: made.doomed({})(to(5, there)) for there in ("203.0.113.7", "203.0.113.8", "127.0.0.1", "2001:db8::1")
    }
    assert judged == {"203.0.113.7": False, "203.0.113.8": True, "127.0.0.1": False, "2001:db8::1": False}


def test_an_agent_that_changes_policy_keeps_only_what_both_treat_alike() -> None:
    """Through the old policy's listener, which the new one does not have."""
    old = build(rule("x.com"), rule("y.com"), agents=[AGENT])
    new = build(rule("x.com"), rule("y.com"), rule("y.com/a", scope=AGENT), agents=[AGENT], allocations=old.allocations)
    made, port = move(old, new), old.plan.policies[1].egress_port
    assert made is not None and old.plan.agents[AGENT] != new.plan.agents[AGENT]
    assert not made.doomed(carries("x.com", port))(to(port))
    assert made.doomed(carries("y.com", port))(to(port))
    assert made.doomed({})(to(port))
