"""Which connections of an agent a change of policy leaves without permission (R13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.host.sockets import SocketInfo
from clawker_cp.firewall.changes import Change
from clawker_cp.firewall.direct import passes
from clawker_cp.firewall.hosts import HostTable, equal_in_both, may_stay, takes_nothing
from clawker_cp.firewall.plan import Plan, Policy
from clawker_cp.telemetry.connections import Live


class PolicyMove:
    """
    What a change does to the connections of agents that leave `old` for `new`, or stay when both have one number.

    Made once for all of them: to index a policy of 1,000 rules takes longer than to look at an agent's sockets.
    """

    def __init__(self, old: Policy, new: Policy, change: Change, network: AgentNetwork) -> None:
        self._old, self._new = HostTable.of(old), HostTable.of(new)
        self._plan = change.new
        self._network = network
        self._ports = listeners(new)
        self._read = http_listeners(old) & http_listeners(new)
        self._proxies = {row.port for row in change.old.proxy_ports} | self._ports
        self._only_adds = (
            old.id == new.id and change.old.cidrs == change.new.cidrs and takes_nothing(self._old, self._new)
        )

    @classmethod
    def of(cls, before: int, after: int, change: Change, network: AgentNetwork) -> PolicyMove | None:
        """The move from one policy number to another; None where one of them is not in its plan."""
        old, new = change.old.policies.get(before), change.new.policies.get(after)
        return None if old is None or new is None else cls(old, new, change, network)

    def concerns(self, living: Mapping[int, Live]) -> bool:
        """
        Whether an agent's sockets have to be looked at: not where the change only adds, unless the proxy has said
        since the last one that a connection carries what is forbidden, or that one could not be cut.
        """
        return not self._only_adds or not all(self._stays(live) for live in living.values())

    def _stays(self, live: Live) -> bool:
        if not may_stay(self._old, self._new, live.host, live.port, tls=live.tls):
            return False
        # A listener of a policy that the agent has left, now or earlier: only what is equal in both stays.
        return live.listener in self._ports or equal_in_both(self._old, self._new, live.host, live.port, tls=live.tls)

    def doomed(self, living: Mapping[int, Live]) -> Callable[[SocketInfo], bool]:
        """
        Say which sockets have no permission left: proxied ones by what the proxy last said of them (`living`, by
        source port) or by their listener, direct ones by their address.
        """
        proxy, direct = self._network.proxy, unpassed(self._plan, self._new.policy.id, self._network)
        kept: set[tuple[int, int]] = set()
        forbidden: set[tuple[int, int]] = set()
        for source, live in living.items():
            (kept if self._stays(live) else forbidden).add((source, live.listener))

        def judge(info: SocketInfo) -> bool:
            if info.destination == proxy:
                here, port = (info.source_port, info.destination_port), info.destination_port
                if port in self._ports:
                    return port in self._read and here in forbidden
                return port in self._proxies and here not in kept
            return direct(info)

        return judge


def unpassed(plan: Plan, number: int, network: AgentNetwork) -> Callable[[SocketInfo], bool]:
    """Say which sockets lead where a policy passes nothing directly; what is served here is no such place."""

    def judge(info: SocketInfo) -> bool:
        if info.destination in network.served or info.destination.startswith("127.") or ":" in info.destination:
            return False
        return not passes(plan, number, info.protocol, info.destination, info.destination_port)

    return judge


def http_listeners(policy: Policy) -> set[int]:
    """Ports on which the proxy reads the name, so that its record decides."""
    return {policy.egress_port, *(origin.listen for origin in policy.origins if origin.listen)}


def listeners(policy: Policy) -> set[int]:
    """Every proxy port of a policy."""
    return {*http_listeners(policy), *(target.listen for target in policy.opaque)}
