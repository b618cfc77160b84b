"""
A model of kernel, gate and proxy that runs a compiled plan, for tests to ask what would happen.

It knows rows and virtual hosts only, never rules: what it answers is what the plan makes the
data plane do.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from clawker_cp.firewall.allocations import EMPTY, Allocations
from clawker_cp.firewall.compile import Compiled, compile_plan
from clawker_cp.firewall.paths import judge
from clawker_cp.firewall.plan import (
    IDENTITY_CATCH_ALL,
    TCP,
    UDP,
    HttpOrigin,
    Materialised,
    NameClass,
    Policy,
    RouteAction,
    RouteRow,
    Topology,
)
from clawker_cp.firewall.rules import Problem, Rule, normalise
from clawker_cp.firewall.shorthand import parse_rule_shorthand
from clawker_cp.firewall.validate import rule_problems


def rule(text: str, action: str = "allow", scope: str = "global", **fields: Any) -> Rule:
    """Make a rule from a shorthand, with other fields set."""
    made = normalise(replace(parse_rule_shorthand(text, action, scope=scope), **fields))
    assert rule_problems(made) == []
    return made


def deny(text: str, scope: str = "global", **fields: Any) -> Rule:
    """Make a deny rule from a shorthand."""
    return rule(text, "deny", scope, **fields)


def build(
    *rules: Rule,
    agents: Iterable[str] = (),
    topology: Topology | None = None,
    allocations: Allocations = EMPTY,
    names: Iterable[str] = (),
    sans: Iterable[str] = (),
    now: float = 1000.0,
    learn: Iterable[str] = (),
) -> Compiled:
    """Compile, expecting a plan; names and sans are materialised for every policy."""
    live = Materialised(frozenset(names), frozenset(sans))
    scopes = {one.scope for one in rules} | {"global"} | set(learn)
    found = compile_plan(
        rules,
        agents,
        topology or Topology(),
        allocations,
        concrete=dict.fromkeys(scopes, live) if live != Materialised() else {},
        now=now,
        learn=frozenset(learn),
    )
    assert isinstance(found, Compiled), found
    return found


def problems(*rules: Rule, topology: Topology | None = None, allocations: Allocations = EMPTY) -> list[Problem]:
    """Compile, expecting problems."""
    found = compile_plan(rules, (), topology or Topology(), allocations, now=1000.0)
    assert isinstance(found, list)
    return found


class World:
    """One policy's data plane."""

    def __init__(self, compiled: Compiled, policy: int = 1) -> None:
        self.plan = compiled.plan
        self.policy: Policy = compiled.plan.policies[policy]
        self.routes = {
            (row.identity, row.port, row.l4): row for row in self.plan.routes if row.policy == self.policy.id
        }

    # -- gate

    def name_class(self, name: str) -> NameClass | None:
        """Find the class as the gate's matcher does: exact, else the longest base above."""
        if name in self.policy.exact:
            return self.policy.exact[name]
        while "." in name:
            name = name.partition(".")[2]
            if name in self.policy.below:
                return self.policy.below[name]
        return None

    def resolves(self, name: str) -> bool:
        """Whether the gate answers."""
        found = self.name_class(name)
        return found.allowed if found is not None else self.policy.learn

    def identity(self, name: str) -> int:
        """The identity under which the name's addresses are in the kernel."""
        found = self.name_class(name)
        assert found is not None and found.allowed
        return self.policy.concrete[name] if found.wildcard_opaque else found.identity

    # -- kernel

    def route(self, name: str, port: int, l4: int = TCP) -> RouteRow | None:
        """The row that decides for a freshly resolved name; the catch-all if it has none."""
        own = self.routes.get((self.identity(name), port, l4)) if self.resolves(name) else None
        return own or self.routes.get((IDENTITY_CATCH_ALL, port, l4))

    def listener(self, name: str, port: int, l4: int = TCP) -> str:
        """Where bytes to (name, port) end: "deny", "none", "egress", or the target "dst:port"."""
        row = self.route(name, port, l4)
        if row is None:
            return "none"
        if row.action is RouteAction.DENY:
            return "deny"
        assert row.action is RouteAction.PROXY
        admitted = {(one.l4, one.port) for one in self.plan.proxy_ports if one.policy == self.policy.id}
        assert (l4, row.proxy_port) in admitted
        if row.proxy_port == self.policy.egress_port:
            return "egress"
        (target,) = (one for one in self.policy.opaque if (one.l4, one.listen) == (l4, row.proxy_port))
        return f"{target.dst}:{target.port}"

    # -- proxy

    def host(self, name: str, port: int, *, tls: bool) -> HttpOrigin | str:
        """What the egress listener does with a host: an origin, "pass", "rule_deny" or "host_not_allowed"."""
        entries: list[tuple[str, bool, HttpOrigin | str]] = []
        policy = self.policy
        entries += [
            (one.base, one.wildcard, one)
            for one in policy.origins
            if (one.port, one.tls, one.is_address) == (port, tls, False)
        ]
        entries += [
            (one.base, one.wildcard, "rule_deny")
            for one in policy.denied_hosts
            if port in one.ports and one.tls in (None, tls)
        ]
        entries += [(one.base, one.wildcard, "pass") for one in policy.passthrough if tls and one.port == port]
        places = [(base, wildcard) for base, wildcard, _ in entries]
        assert len(places) == len(set(places)), "two virtual hosts with one domain"
        exact = next((what for base, wildcard, what in entries if base == name and not wildcard), None)
        if exact is not None:
            return exact
        above = [e for e in entries if e[1] and (name == e[0] or name.endswith("." + e[0]))]
        return max(above, key=lambda entry: len(entry[0]))[2] if above else "host_not_allowed"

    def http(self, name: str, port: int = 443, *, tls: bool = True, upgrade: bool = False, **request: str) -> str:
        """The reason a request through the egress listener ends with; "forwarded" if it passes."""
        found = self.host(name, port, tls=tls)
        if found == "pass":
            return "forwarded"
        if isinstance(found, str):
            return found
        policy = found.ws if upgrade else found.http or found.ws
        if policy is None:
            return "request_refused"
        return judge(policy, request.get("method", "GET"), request.get("path", "/")).reason

    def reaches(self, name: str, port: int, proto: str) -> bool:
        """Whether a GET / (or raw bytes) to a freshly resolved name gets through."""
        if not self.resolves(name):
            return False
        if proto == "udp":
            return self.listener(name, port, UDP) == f"{name}:{port}"
        where = self.listener(name, port)
        if where == f"{name}:{port}":
            return proto in ("tcp", "ssh")
        if where != "egress" or proto in ("tcp", "ssh"):
            return False
        tls, upgrade = proto in ("https", "wss"), proto in ("ws", "wss")
        return self.http(name, port, tls=tls, upgrade=upgrade) == "forwarded"

    # -- addresses

    def address(self, text: str, port: int, l4: int = TCP) -> str:
        """What the kernel does with an address by rule: "deny", "pass", "none", or the target "dst:port"."""
        address = ipaddress.ip_address(text)
        rows = [row for (_, row_l4, net), row in self.plan.cidrs.items() if row_l4 == l4 and address in net]
        rows = [row for row in rows if row.policy == self.policy.id]
        if not rows:
            return "none"
        longest = max(rows, key=lambda row: row.prefix.prefixlen)
        assert len(longest.spans) <= 16
        for span in longest.spans:
            if span.low <= port <= span.high:
                if span.action is RouteAction.PROXY:
                    return self._target(l4, span.proxy_port)
                return "pass" if span.action is RouteAction.PASS else "deny"
        return "none"

    def _target(self, l4: int, listen: int) -> str:
        targets = [f"{one.dst}:{one.port}" for one in self.policy.opaque if (one.l4, one.listen) == (l4, listen)]
        targets += [f"http {one.base}:{one.port}" for one in self.policy.origins if one.listen == listen][:1]
        (target,) = targets
        return target


def world(*rules: Rule, policy: int = 1, names: Sequence[str] = (), **options: Any) -> World:
    """Compile and wire up one policy."""
    return World(build(*rules, names=names, **options), policy)
