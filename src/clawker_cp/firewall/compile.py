"""
Rules in, plan out: one pure function over all rules of all scopes (architecture 3.3, I5).

Equal inputs give equal plans, and either a whole plan comes back or every problem at once. No
I/O: allocations come in as a snapshot and go out as the next one, to be kept by the caller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from clawker_cp.firewall.allocations import Allocations, Allocator, ExhaustedError, Use, egress_port
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
class PolicyPart:
    """One policy's share of a plan, with all it was made from: equal inputs need no second compile."""

    facts: tuple[Facts, ...]
    materialised: Materialised
    learn: bool
    uses: tuple[Use, ...]  # numbers it took
    policy: Policy
    routes: frozenset[RouteRow]
    cidrs: tuple[CidrRow, ...]
    proxy_ports: frozenset[ProxyPort]
    effective: tuple[Rule, ...]
    live: Materialised
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """
    A plan and what belongs to it.

    `allocations` is to be kept if it differs from what came in. `live` is what is left of the
    materialised names, by policy key. `effective` holds the rules of each policy number. `parts`
    are for the next compile only.
    """

    plan: Plan
    allocations: Allocations
    live: Mapping[str, Materialised]
    effective: Mapping[int, tuple[Rule, ...]]
    warnings: tuple[str, ...] = ()
    topology: Topology = field(default_factory=Topology, compare=False)
    parts: Mapping[str, PolicyPart] = field(default_factory=dict, compare=False, repr=False)


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
        lingering: frozenset[str],
        previous: Compiled | None,
    ) -> None:
        self._positions: dict[Rule, int] = {}
        for position, rule in enumerate(rules):
            self._positions.setdefault(rule, position)
        self._rules = rules
        self._topology = topology
        self._concrete = concrete
        self._learn = learn
        self._lingering = lingering
        self._known = previous.parts if previous is not None and previous.topology == topology else {}
        self._allocator = Allocator(allocations, max_policies=topology.max_policies, busy=topology.busy, now=now)
        self._by_scope: defaultdict[str, list[Facts]] = defaultdict(list)
        for rule in rules:
            if is_live(rule, now):
                self._by_scope[rule.scope].append(read_rule(rule, tls_minimal=topology.tls_minimal))
        self.problems: dict[tuple[int, str, str], Problem] = {}
        self.warnings: dict[str, None] = {}
        self.parts: dict[str, PolicyPart] = {}

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
        for key in sorted(self._lingering - keys, key=scope_order):
            try:
                self._policy(key)
            except ExhaustedError:
                return  # what is only kept for a while makes room for what is asked for

    def finish(self, agents: Mapping[str, int]) -> Compiled:
        """Put the parts together; only without problems."""
        parts = self.parts.values()
        for part in parts:
            self.warnings.update(dict.fromkeys(part.warnings))
        cidrs: dict[tuple[int, int, IPNetwork], CidrRow] = {
            (row.policy, row.l4, row.prefix): row for part in parts for row in part.cidrs
        }
        rule_ids = self._allocator.rule_ids()
        plan = Plan(
            policies={part.policy.id: part.policy for part in parts},
            agents=agents,
            routes=frozenset[RouteRow]().union(*(part.routes for part in parts)),
            cidrs=cidrs,
            proxy_ports=frozenset[ProxyPort]().union(*(part.proxy_ports for part in parts)),
            rule_ids=rule_ids,
            warnings=tuple(self.warnings),
        )
        return Compiled(
            plan=plan,
            allocations=self._allocator.finish(),
            live={key: part.live for key, part in self.parts.items() if part.live != NOTHING},
            effective={part.policy.id: part.effective for part in parts},
            warnings=tuple(self.warnings),
            topology=self._topology,
            parts=self.parts,
        )

    def _policy(self, key: str) -> None:
        scopes = scopes_of(key) if key.startswith("agent:") else (GLOBAL, key) if key != GLOBAL else (GLOBAL,)
        facts = tuple(one for scope in scopes for one in self._by_scope.get(scope, ()))
        number = self._allocator.policy(key)
        materialised = self._concrete.get(key, NOTHING)
        learn = key in self._learn
        known = self._known.get(key)
        if (
            known is not None
            and known.policy.id == number
            and (known.facts, known.materialised, known.learn) == (facts, materialised, learn)
            and self._allocator.repeat(known.uses)
        ):
            self.parts[key] = known
            return
        self._allocator.take_uses()
        egress = egress_port(number)
        names = NameCompiler(
            number,
            egress,
            (one for one in facts if one.kind is Kind.NAME),
            self._allocator,
            materialised,
            http3=self._topology.http3,
            learn=learn,
        ).run()
        addresses = AddressCompiler(number, key, facts, self._allocator, self._topology.reserved).run()
        self._trouble(names, addresses)
        listing = most_specific_first(facts)
        policy = _policy_of(number, key, learn, names, addresses, listing)
        routes, cidrs = frozenset(names.routes), tuple(addresses.cidrs)
        self.parts[key] = PolicyPart(
            facts=facts,
            materialised=materialised,
            learn=learn,
            uses=self._allocator.take_uses(),
            policy=policy,
            routes=routes,
            cidrs=cidrs,
            proxy_ports=_proxy_ports(policy, with_quic=bool(names.quic_ports)),
            effective=tuple(one.rule for one in listing),
            live=names.live,
            warnings=self._warnings(addresses),
        )

    def _warnings(self, addresses: AddressPart) -> tuple[str, ...]:
        found = list(addresses.warnings)
        if not self._topology.ipv6 and any(row.prefix.version == 6 for row in addresses.cidrs):
            found.append("IPv6 address rules have no effect while the agents' network does not route IPv6")
        return tuple(found)

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

    def _capacity(self, key: str, limit: str) -> None:
        what = {
            "policies": f"needs one more policy than the {self._topology.max_policies} this host can serve",
            "listeners": "needs more proxy listeners than the band holds, narrow port ranges or remove rules",
        }[limit]
        scopes = [key, GLOBAL] if limit == "policies" else list(self._by_scope)
        # Leaving out a deny would not help and would open something: an allow is named.
        rules = [one.rule for scope in scopes for one in self._by_scope.get(scope, ()) if not one.deny]
        if rules:
            last = max(rules, key=lambda rule: (rule.scope == key, self._positions[rule]))
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
    lingering: frozenset[str] = frozenset(),
    previous: Compiled | None = None,
) -> Compiled | list[Problem]:
    """
    Compile all rules of all scopes.

    `rules` are valid and normalised. `agents` are agent scope keys ("agent:p/a") whose policy
    numbers are wanted; every scope with a rule has a policy whether or not an agent lives there.
    `concrete` is keyed by policy key, `now` is Unix seconds, `learn` are agent scope keys. `lingering` are policy
    keys that keep their listeners without a rule of their own, for connections that agents made under them.
    `previous` only makes it faster: policies whose rules are the same are taken over from it.
    Returns all problems, indexed by position in `rules`, if there is any. Never raises for bad
    rules. Takes milliseconds per hundred changed rules: call it through a thread.
    """
    if len(rules) > MAX_RULES_STORED:
        text = f"has {len(rules)} rules, at most {MAX_RULES_STORED} can be kept"
        return [Problem(MAX_RULES_STORED, rules[MAX_RULES_STORED].dst, "store", text, "CAPACITY", "rules")]
    compiler = _Compiler(rules, topology, allocations, concrete or {}, now, learn, lingering, previous)
    compiler.run()
    if compiler.problems:
        return sorted(compiler.problems.values(), key=lambda problem: (problem.index, problem.field))
    numbers = {key: part.policy.id for key, part in compiler.parts.items()}
    scopes = compiler.scopes()
    wanted = sorted(set(agents) | learn)
    return compiler.finish({agent: numbers[policy_key(agent, scopes, learn)] for agent in wanted})


def _policy_of(
    number: int, key: str, learn: bool, names: NamePart, addresses: AddressPart, listing: Sequence[Facts]
) -> Policy:
    return Policy(
        id=number,
        key=key,
        learn=learn,
        egress_port=egress_port(number),
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


def _proxy_ports(policy: Policy, *, with_quic: bool) -> frozenset[ProxyPort]:
    """Return the proxy ports that packets of the policy may go to."""
    ports = {ProxyPort(policy.id, TCP, policy.egress_port)}
    if with_quic:
        ports.add(ProxyPort(policy.id, UDP, policy.egress_port))
    ports |= {ProxyPort(policy.id, target.l4, target.listen) for target in policy.opaque}
    ports |= {ProxyPort(policy.id, TCP, origin.listen) for origin in policy.origins if origin.listen}
    return frozenset(ports)
