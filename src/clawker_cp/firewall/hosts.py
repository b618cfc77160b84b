"""
Which virtual host of a policy a request belongs to, and whether a connection may outlive a change.

The proxy matches hosts itself; this is the same matching over a plan, for whoever has to cut
connections that a change forbids (contract 6.1, R13) or to explain one. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clawker_cp.firewall.plan import DeniedHost, HttpOrigin, OpaqueTarget, Passthrough, Policy

Entry = HttpOrigin | DeniedHost | Passthrough
_Place = tuple[str, int, bool]  # base, port, tls


@dataclass(frozen=True, slots=True)
class HostTable:
    """The virtual hosts of one policy by name; exact ones, and those of whole subtrees."""

    policy: Policy
    exact: Mapping[_Place, Entry]
    subtrees: Mapping[_Place, Entry]
    opaque: Mapping[tuple[int, str, int], OpaqueTarget]

    @classmethod
    def of(cls, policy: Policy) -> HostTable:
        """Index a policy."""
        exact: dict[_Place, Entry] = {}
        subtrees: dict[_Place, Entry] = {}
        for origin in policy.origins:
            (subtrees if origin.wildcard else exact)[origin.base, origin.port, origin.tls] = origin
        for denied in policy.denied_hosts:
            sides = (True, False) if denied.tls is None else (denied.tls,)
            for port in denied.ports:
                for tls in sides:
                    (subtrees if denied.wildcard else exact)[denied.base, port, tls] = denied
        for passed in policy.passthrough:
            (subtrees if passed.wildcard else exact)[passed.base, passed.port, True] = passed
        opaque = {(target.l4, target.dst, target.port): target for target in policy.opaque}
        return cls(policy, exact, subtrees, opaque)

    def find(self, host: str, port: int, *, tls: bool) -> Entry | None:
        """Return the entry a host belongs to, exact before the longest subtree; None = refused by default."""
        name = host.rstrip(".").lower()
        found = self.exact.get((name, port, tls))
        while found is None and name:
            found = self.subtrees.get((name, port, tls))
            name = name.partition(".")[2]
        return found

    def allows(self, host: str, port: int, *, tls: bool) -> bool:
        """Whether any request to the host can pass, whatever its path."""
        found = self.find(host, port, tls=tls)
        return found is not None and not isinstance(found, DeniedHost)

    def reaches(self, l4: int, dst: str, port: int) -> bool:
        """Whether an unread listener for the destination exists."""
        return (l4, dst, port) in self.opaque


def takes_nothing(old: HostTable, new: HostTable) -> bool:
    """
    Whether `new` treats everything that `old` speaks for in the same way, so that no connection of it has to end.

    False when in doubt: what is new may neither lie below something old nor hold for every port.
    """
    pairs = ((old.exact, new.exact), (old.subtrees, new.subtrees))
    if old.policy.egress_port != new.policy.egress_port or not old.opaque.items() <= new.opaque.items():
        return False
    if not all(before.items() <= after.items() for before, after in pairs):
        return False
    added = (key for before, after in pairs for key in after if key not in before)
    return all(port and old.find(base, port, tls=tls) is None for base, port, tls in added)


def may_stay(old: HostTable, new: HostTable, host: str, port: int, *, tls: bool) -> bool:
    """
    Whether a proxied connection may outlive a change.

    Within one policy: if the host stays allowed, whatever happened to its paths. When the agent has
    moved to another policy: only if origin, port and deciding rules are equal in both, and never
    for plain HTTP, which may carry the next request to another host (R13).
    """
    after = new.find(host, port, tls=tls)
    if after is None or isinstance(after, DeniedHost):
        return False
    if old.policy.key == new.policy.key:
        return isinstance(after, Passthrough) == isinstance(old.find(host, port, tls=tls), Passthrough)
    return equal_in_both(old, new, host, port, tls=tls)


def equal_in_both(old: HostTable, new: HostTable, host: str, port: int, *, tls: bool) -> bool:
    """
    Whether origin, port and deciding rules of a host are the same in both, and it can carry no other host.
    """
    after = new.find(host, port, tls=tls)
    if not tls or after is None or isinstance(after, DeniedHost):
        return False
    return after == old.find(host, port, tls=tls)
