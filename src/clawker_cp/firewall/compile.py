"""
Rules in, plan out: one pure function over all rules of all scopes (architecture 3.3, I5).

Equal inputs give equal plans, and either a whole plan comes back or every problem at once. No
I/O: allocations come in as a snapshot and go out as the next one, to be kept by the caller.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from clawker_cp.firewall.allocations import Allocations, Allocator, ExhaustedError, egress_port
from clawker_cp.firewall.compile_addresses import MAX_SPANS, AddressCompiler, AddressPart
from clawker_cp.firewall.compile_names import Conflict, NameCompiler, NamePart
from clawker_cp.firewall.destinations import Kind
from clawker_cp.firewall.effective import Facts, is_live, most_specific_first, policy_key, read_rule
from clawker_cp.firewall.plan import (
    TCP,
    UDP,
    CidrRow,
    IPNetwork,
    Materialised,
    Plan,
    Policy,
    ProxyPort,
    RouteRow,
    Topology,
)
from clawker_cp.firewall.rules import GLOBAL, Problem, Rule, scope_order, scopes_of
from clawker_cp.firewall.validate import MAX_RULES_STORED

NOTHING = Materialised()


@dataclass(frozen=True, slots=True)
class Compiled:
    """
    A plan and what belongs to it.

    `allocations` is to be kept if it differs from what came in. `live` is what is left of the
    materialised names, by policy key. `effective` holds the rules of each policy number.
    """

    plan: Plan
    allocations: Allocations
    live: Mapping[str, Materialised]
    effective: Mapping[int, tuple[Rule, ...]]
    warnings: tuple[str, ...] = ()


class _Compiler:
    """Gathers the parts of one compile."""

    def __init__(
        self,
        rules: Sequence[Rule],
        topology: Topology,
        allocations: Allocations,
        concrete: Mapping[str, Materialised],
        now: float,
        learn: frozenset[str],
    ) -> None:
        self._positions: dict[Rule, int] = {}
        for position, rule in enumerate(rules):
            self._positions.setdefault(rule, position)
        self._rules = rules
        self._topology = topology
        self._concrete = concrete
        self._learn = learn
        self._allocator = Allocator(allocations, max_policies=topology.max_policies, busy=topology.busy, now=now)
        self._by_scope: defaultdict[str, list[Facts]] = defaultdict(list)
        for rule in rules:
            if is_live(rule, now):
                self._by_scope[rule.scope].append(read_rule(rule, tls_minimal=topology.tls_minimal))
        self.problems: dict[tuple[int, str, str], Problem] = {}
        self.warnings: dict[str, None] = {}
        self.policies: dict[int, Policy] = {}
        self.effective: dict[int, tuple[Rule, ...]] = {}
        self.live: dict[str, Materialised] = {}
        self.routes: set[RouteRow] = set()
        self.cidrs: dict[tuple[int, int, IPNetwork], CidrRow] = {}
        self.proxy_ports: set[ProxyPort] = set()

    def scopes(self) -> frozenset[str]:
        """Return the scopes that have an unexpired rule."""
        return frozenset(self._by_scope)

    def run(self) -> None:
        self._agreement()
        keys = {GLOBAL, *self._by_scope, *self._learn}
        for key in sorted(keys, key=scope_order):
            try:
                self._policy(key)
            except ExhaustedError as exhausted:
                self._capacity(key, exhausted.limit)
                if exhausted.limit == "policies":
                    break

    def finish(self, agents: Mapping[str, int]) -> Compiled:
        plan = Plan(
            policies=self.policies,
            agents=agents,
            routes=frozenset(self.routes),
            cidrs=self.cidrs,
            proxy_ports=frozenset(self.proxy_ports),
            rule_ids=self._allocator.rule_ids(),
            warnings=tuple(self.warnings),
        )
        return Compiled(
            plan=_with_digest(plan),
            allocations=self._allocator.finish(),
            live=self.live,
            effective=self.effective,
            warnings=tuple(self.warnings),
        )

    def _policy(self, key: str) -> None:
        scopes = scopes_of(key) if key.startswith("agent:") else (GLOBAL, key) if key != GLOBAL else (GLOBAL,)
        facts = [one for scope in scopes for one in self._by_scope.get(scope, ())]
        number = self._allocator.policy(key)
        egress = egress_port(number)
        names = NameCompiler(
            number,
            egress,
            (one for one in facts if one.kind is Kind.NAME),
            self._allocator,
            self._concrete.get(key, NOTHING),
            http3=self._topology.http3,
            learn=key in self._learn,
        ).run()
        addresses = AddressCompiler(number, key, facts, self._allocator, self._topology.reserved).run()
        self._trouble(names, addresses)
        self._rows(number, egress, names, addresses)
        listing = most_specific_first(facts)
        self.effective[number] = tuple(one.rule for one in listing)
        if names.live != NOTHING:
            self.live[key] = names.live
        self.policies[number] = Policy(
            id=number,
            key=key,
            learn=key in self._learn,
            egress_port=egress,
            origins=tuple(
                sorted([*names.origins, *addresses.origins], key=lambda o: (o.base, o.wildcard, o.port, not o.tls))
            ),
            denied_hosts=tuple(sorted(names.denied_hosts, key=lambda d: (d.base, d.wildcard, d.ports, not d.tls))),
            passthrough=tuple(sorted(names.passthrough, key=lambda p: (p.base, p.wildcard, p.port))),
            opaque=tuple(target for _, target in sorted((names.opaque | addresses.opaque).items())),
            sans=tuple(sorted(names.sans)),
            http_ports=frozenset(names.http_ports),
            rule_ids=tuple(dict.fromkeys(one.id for one in listing)),
            exact=names.exact,
            below=names.below,
            concrete=names.concrete,
        )

    def _rows(self, number: int, egress: int, names: NamePart, addresses: AddressPart) -> None:
        self.routes.update(names.routes)
        self.cidrs.update({(row.policy, row.l4, row.prefix): row for row in addresses.cidrs})
        self.proxy_ports.add(ProxyPort(number, TCP, egress))
        if names.quic_ports:
            self.proxy_ports.add(ProxyPort(number, UDP, egress))
        for target in (*names.opaque.values(), *addresses.opaque.values()):
            self.proxy_ports.add(ProxyPort(number, target.l4, target.listen))
        for origin in addresses.origins:
            self.proxy_ports.add(ProxyPort(number, TCP, origin.listen))

    # -- problems ----------------------------------------------------------------------------

    def _problem(self, rule: Rule, field: str, text: str, code: str = "RULE_INVALID", limit: str = "") -> None:
        index = self._positions.get(rule, -1)
        self.problems.setdefault((index, field, text), Problem(index, rule.dst, field, text, code, limit))

    def _conflict(self, conflict: Conflict) -> None:
        """Report a conflict at the rule that came later; the text names both."""
        first, second, field, text = conflict
        later = max((first, second), key=lambda rule: self._positions.get(rule, -1))
        self._problem(later, field, f"conflicts: {text}")

    def _trouble(self, names: NamePart, addresses: AddressPart) -> None:
        for conflict in (*names.conflicts, *addresses.conflicts):
            self._conflict(conflict)
        for rule, prefix in addresses.too_many:
            text = f"leaves {prefix} with more than {MAX_SPANS} port ranges, join some of the rules"
            self._problem(rule, "port", text, "CAPACITY", "rules")
        self.warnings.update(dict.fromkeys(addresses.warnings))
        if not self._topology.ipv6 and any(row.prefix.version == 6 for row in addresses.cidrs):
            self.warnings["IPv6 address rules have no effect while the agents' network does not route IPv6"] = None

    def _capacity(self, key: str, limit: str) -> None:
        what = {
            "policies": f"needs one more policy than the {self._topology.max_policies} this host can serve",
            "listeners": "needs more proxy listeners than the band holds, narrow port ranges or remove rules",
        }[limit]
        rules = self._by_scope.get(key) or self._by_scope.get(GLOBAL)
        if rules:
            last = max((one.rule for one in rules), key=lambda rule: self._positions[rule])
            self._problem(last, "scope" if limit == "policies" else "port", what, "CAPACITY", limit)
        else:
            self.problems[-1, "scope", what] = Problem(-1, key, "scope", what, "CAPACITY", limit)

    def _agreement(self) -> None:
        """Rules of one name must agree on private answers, in all scopes (7.1)."""
        said: dict[tuple[str, bool], Rule] = {}
        for facts in (one for rules in self._by_scope.values() for one in rules):
            if facts.deny or facts.kind is not Kind.NAME:
                continue
            first = said.setdefault((facts.base, facts.destination.wildcard), facts.rule)
            if bool(first.allow_private) != bool(facts.rule.allow_private):
                text = f"{first.key} ({first.scope}) and {facts.rule.key} ({facts.rule.scope}) disagree"
                self._conflict((first, facts.rule, "allow_private", text))


def compile_plan(
    rules: Sequence[Rule],
    agents: Iterable[str],
    topology: Topology,
    allocations: Allocations,
    *,
    concrete: Mapping[str, Materialised] | None = None,
    now: float,
    learn: frozenset[str] = frozenset(),
) -> Compiled | list[Problem]:
    """
    Compile all rules of all scopes.

    `rules` are valid and normalised. `agents` are agent scope keys ("agent:p/a") whose policy
    numbers are wanted; every scope with a rule has a policy whether or not an agent lives there.
    `concrete` is keyed by policy key, `now` is Unix seconds, `learn` are agent scope keys. Returns
    all problems, indexed by position in `rules`, if there is any. Never raises for bad rules.
    """
    if len(rules) > MAX_RULES_STORED:
        text = f"has {len(rules)} rules, at most {MAX_RULES_STORED} can be kept"
        return [Problem(MAX_RULES_STORED, rules[MAX_RULES_STORED].dst, "store", text, "CAPACITY", "rules")]
    compiler = _Compiler(rules, topology, allocations, concrete or {}, now, learn)
    compiler.run()
    if compiler.problems:
        return sorted(compiler.problems.values(), key=lambda problem: (problem.index, problem.field))
    numbers = {policy.key: policy.id for policy in compiler.policies.values()}
    scopes = compiler.scopes()
    wanted = sorted(set(agents) | learn)
    return compiler.finish({agent: numbers[policy_key(agent, scopes, learn)] for agent in wanted})


def _facts_of(plan: Plan) -> Iterator[bytes]:
    for number in sorted(plan.policies):
        yield repr(plan.policies[number]).encode()
    yield repr(sorted(plan.agents.items())).encode()
    yield repr(sorted(plan.routes, key=lambda r: (r.policy, r.identity, r.port, r.l4))).encode()
    yield repr(sorted(plan.cidrs.values(), key=lambda r: (r.policy, r.l4, str(r.prefix)))).encode()
    yield repr(plan.rule_ids).encode()


def _with_digest(plan: Plan) -> Plan:
    digest = hashlib.blake2b(digest_size=16)
    for part in _facts_of(plan):
        digest.update(part)
    return Plan(
        plan.policies,
        plan.agents,
        plan.routes,
        plan.cidrs,
        plan.proxy_ports,
        plan.rule_ids,
        plan.warnings,
        digest.hexdigest(),
    )
