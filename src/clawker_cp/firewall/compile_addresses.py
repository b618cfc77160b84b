"""
The address half of the compile: rules on addresses and networks become flattened spans (R9).

A row exists per prefix that a rule names; its spans say what every covering prefix says of its
ports, so that the kernel's longest match never hides a shorter prefix. Called by `compile.py`.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from clawker_cp.firewall.allocations import Allocator
from clawker_cp.firewall.destinations import Kind
from clawker_cp.firewall.effective import Facts, path_policy, transports
from clawker_cp.firewall.plan import (
    TCP,
    UDP,
    CidrRow,
    HttpOrigin,
    IPNetwork,
    OpaqueTarget,
    PathPolicy,
    RouteAction,
    Span,
)
from clawker_cp.firewall.ports import MAX_PORT
from clawker_cp.firewall.rules import Rule
from clawker_cp.firewall.spans import segments

MAX_SPANS = 16

Conflict = tuple[Rule, Rule, str, str]  # first, second, field, text


@dataclass(slots=True)
class AddressPart:
    """What the addresses of one policy compile to."""

    origins: list[HttpOrigin] = field(default_factory=list)
    opaque: dict[tuple[int, str, int], OpaqueTarget] = field(default_factory=dict)
    cidrs: list[CidrRow] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    too_many: list[tuple[Rule, IPNetwork]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class AddressCompiler:
    """Compiles the addresses of one policy; used once."""

    def __init__(
        self,
        policy: int,
        key: str,
        facts: Iterable[Facts],
        allocator: Allocator,
        reserved: tuple[IPNetwork, ...],
    ) -> None:
        self._policy = policy
        self._key = key
        self._allocator = allocator
        self._reserved = reserved
        self._part = AddressPart()
        self._by_prefix: defaultdict[IPNetwork, list[Facts]] = defaultdict(list)
        for one in facts:
            network = one.destination.network
            if network is None:
                continue
            holder = next((net for net in reserved if _holds(net, network)), None)
            if holder is not None and not one.deny:
                self._part.warnings.append(f"{one.rule.key} has no effect: {holder} is reserved for this host")
            else:
                self._by_prefix[network].append(one)

    def run(self) -> AddressPart:
        """Compile; raises `allocations.ExhaustedError` when a band is used up."""
        part = self._part
        if not self._by_prefix:
            return part
        shadowed = [net for net in self._reserved if self._covering(net) and net not in self._by_prefix]
        for l4 in (TCP, UDP):
            for prefix in self._by_prefix:
                self._row(prefix, l4)
            for prefix in shadowed:
                if any(l4 in transports(one) for one, _ in self._covering(prefix)):
                    part.cidrs.append(CidrRow(self._policy, l4, prefix, (Span(1, MAX_PORT, RouteAction.DENY),)))
        for network, rules in self._by_prefix.items():
            if network.num_addresses == 1:
                self._origins(network, [one for one in rules if one.kind is Kind.ADDRESS])
        return part

    def _covering(self, prefix: IPNetwork) -> list[tuple[Facts, int]]:
        """Return (rule, prefix length) of every rule whose network holds the prefix, longest first."""
        found: list[tuple[Facts, int]] = []
        for length in range(prefix.prefixlen, -1, -1):
            wider = prefix.supernet(new_prefix=length)
            found += [(one, length) for one in self._by_prefix.get(wider, ())]
        return found

    def _row(self, prefix: IPNetwork, l4: int) -> None:
        covering = [(one, length) for one, length in self._covering(prefix) if l4 in transports(one)]
        if not covering:
            return
        spans: list[Span] = []
        for low, high in segments({(one.low, one.high) for one, _ in covering}):
            here = [(one, length) for one, length in covering if one.low <= low and high <= one.high]
            for span in self._spans(low, high, here, l4):
                _append(spans, span)
        if len(spans) > MAX_SPANS:
            self._part.too_many.append((self._by_prefix[prefix][-1].rule, prefix))
            return
        if spans:
            self._part.cidrs.append(CidrRow(self._policy, l4, prefix, tuple(spans)))

    def _spans(self, low: int, high: int, here: list[tuple[Facts, int]], l4: int) -> Iterator[Span]:
        if l4 == UDP and any(one.udp or one.every_protocol for one, _ in here):
            here = [entry for entry in here if entry[0].udp or entry[0].every_protocol]  # they own the port
        length = max(length for _, length in here)
        equal = [one for one, other in here if other == length]
        # Deny beats allow; what the proxy carries beats what goes straight through; a permanent
        # rule beats a grant, whose rows have a deadline.
        winner = max(equal, key=lambda one: (one.deny, one.kind is Kind.ADDRESS, not one.rule.expires_at, one.id))
        number = self._allocator.rule(winner.id)
        expires = winner.rule.expires_at
        if winner.deny:
            yield Span(low, high, RouteAction.DENY, 0, number, expires)
        elif winner.kind is Kind.CIDR:
            yield Span(low, high, RouteAction.PASS, 0, number, expires)
        elif l4 == TCP or winner.udp:
            for port in range(low, high + 1):
                listen = self._listener(winner, l4, port)
                yield Span(port, port, RouteAction.PROXY, listen, number, expires)

    def _listener(self, facts: Facts, l4: int, port: int) -> int:
        if facts.http and not facts.passthrough:
            # Paths differ by policy, so the listener of an HTTP address belongs to one policy.
            return self._allocator.listener(l4, f"{facts.base}@{self._key}", port)
        listen = self._allocator.listener(l4, facts.base, port)
        self._part.opaque[l4, facts.base, port] = OpaqueTarget(facts.base, l4, port, listen, facts.id, is_address=True)
        return listen

    def _origins(self, network: IPNetwork, rules: list[Facts]) -> None:
        """Write the virtual hosts of one address, and find rules that contradict each other there."""
        allows = [one for one in rules if not one.deny]
        for port in sorted({one.low for one in allows if one.http and not one.passthrough}):
            here = [one for one in allows if one.low <= port <= one.high and not one.udp]
            read = [one for one in here if one.http and not one.passthrough]
            unread = [one for one in here if one not in read]
            if unread:
                first, second = unread[0].rule, read[0].rule
                text = f"{first.key} and {second.key} both want this port: one is read by the proxy, one is not"
                self._part.conflicts.append((first, second, "port", text))
                continue
            if self._denied(network, port):
                continue
            listen = self._allocator.listener(TCP, f"{read[0].base}@{self._key}", port)
            for tls in (True, False):
                self._origin([one for one in read if one.tls is tls], port, tls, listen)

    def _denied(self, network: IPNetwork, port: int) -> bool:
        return any(
            one.deny and one.low <= port <= one.high and TCP in transports(one) for one in self._by_prefix[network]
        )

    def _origin(self, rules: list[Facts], port: int, tls: bool, listen: int) -> None:
        if not rules:
            return
        ordinary = [one for one in rules if not one.websocket]
        upgrades = [one for one in rules if one.websocket]
        http: PathPolicy | None = path_policy(ordinary) if ordinary else None
        ws: PathPolicy | None = path_policy(upgrades) if upgrades else None
        insecure = bool((http or ws or _NONE).insecure)
        base = rules[0].base
        self._part.origins.append(
            HttpOrigin(base, False, port, tls, http, ws, insecure, is_address=True, listen=listen)
        )


_NONE = PathPolicy("", (), default_allow=False)


def _append(spans: list[Span], span: Span) -> None:
    """Append a span, joined to the last one if they touch and say the same."""
    if spans:
        last = spans[-1]
        if last.high + 1 == span.low and replace(last, low=span.low, high=span.high) == span:
            spans[-1] = replace(last, high=span.high)
            return
    spans.append(span)


def _holds(wider: IPNetwork, network: IPNetwork) -> bool:
    if isinstance(wider, ipaddress.IPv4Network):
        return isinstance(network, ipaddress.IPv4Network) and network.subnet_of(wider)
    return isinstance(network, ipaddress.IPv6Network) and network.subnet_of(wider)
