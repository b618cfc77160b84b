"""
"May this agent reach that": the answer without trying, from the rules of its policy (contract 2.4).

Pure: the same decision functions as the compile, so the answer is what kernel, gate and proxy
would do with a freshly resolved name. Also finds the rule that nearly matched and writes the
command that would allow the request.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.destinations import Destination, DestinationError, Kind, parse_destination
from clawker_cp.firewall.effective import Facts, RuleIndex, path_policy, read_rule, specificity, transports
from clawker_cp.firewall.outcomes import PortOutcome, Side, decide_port, decide_ports
from clawker_cp.firewall.paths import PathVerdict, judge, matches
from clawker_cp.firewall.plan import TCP, UDP, IPNetwork
from clawker_cp.firewall.ports import HTTP_FAMILY, MAX_PORT, PROTOCOLS, TLS_PROTOCOLS, effective_ports
from clawker_cp.firewall.rules import Rule, normalise_proto

KERNEL = "kernel"
DNS = "dns"
PROXY = "proxy"

PASSED = frozenset({"forwarded", "address_rule", "name_route", "answered"})


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: a name or address; empty fields take the defaults of `CheckRequest`."""

    host: str
    proto: str = "https"
    port: int = 0
    method: str = "GET"
    path: str = "/"


@dataclass(frozen=True, slots=True)
class NearMiss:
    """The rule that came closest and in what it differs: name port proto path method action scope expired."""

    rule: Rule
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer. `rule` None = nothing spoke; `path_rule` "" = the path default."""

    allowed: bool
    layer: str
    reason: str
    rule: Rule | None = None
    path_rule: str = ""
    near_miss: NearMiss | None = None
    allow_command: str = ""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request with its defaults filled in."""

    destination: Destination
    proto: str
    port: int
    method: str
    path: str

    @property
    def host(self) -> str:
        """The name or address, written the way rules write it."""
        return self.destination.base


class Checker:
    """
    Judges requests of one policy.

    `rules` are its effective rules; `others` those that do not hold for it (other scopes, expired):
    they only serve to name a near miss. `agent` is "p/a" and appears in the command.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        agent: str = "/",
        others: Sequence[Rule] = (),
        expired: frozenset[str] = frozenset(),
        reserved: tuple[IPNetwork, ...] = (),
        ipv6: bool = False,
        http3: bool = True,
        tls_minimal: bool = False,
    ) -> None:
        self._facts = [read_rule(rule, tls_minimal=tls_minimal) for rule in rules]
        self._others = [read_rule(rule, tls_minimal=tls_minimal) for rule in others]
        self._expired = expired
        self._index = RuleIndex(self._facts)
        self._agent = agent
        self._reserved = reserved
        self._ipv6 = ipv6
        self._http3 = http3

    def check(self, request: Request) -> Verdict:
        """Judge one request; raises `InvalidInput` naming the field that makes no sense."""
        asked = _fill(request)
        verdict = self._name(asked) if asked.destination.kind is Kind.NAME else self._address(asked)
        if verdict.allowed:
            return verdict
        near = None if verdict.rule is not None and verdict.rule.is_deny else self._near_miss(asked)
        command = allow_command(asked.host, asked.proto, asked.port, self._agent, **_command_parts(asked, verdict))
        return Verdict(False, verdict.layer, verdict.reason, verdict.rule, verdict.path_rule, near, command)

    # -- names -------------------------------------------------------------------------------

    def _name(self, asked: _Asked) -> Verdict:
        candidates = self._index.candidates(asked.host)
        outcomes = decide_ports(candidates)
        if not any(outcome.left for outcome in outcomes):
            denying = next((one for outcome in outcomes for one in outcome.denials()), None)
            if denying is None:
                return Verdict(False, DNS, "not_allowed")
            return Verdict(False, DNS, "rule_deny", denying.rule)
        outcome = decide_port(candidates, asked.port)
        if asked.proto == "udp":
            return self._udp(outcome)
        if outcome.opaque is not None:
            if outcome.opaque.deny:
                return Verdict(False, KERNEL, "rule_deny", outcome.opaque.rule)
            return Verdict(True, KERNEL, "name_route", outcome.opaque.rule)
        if asked.proto in HTTP_FAMILY:
            side = outcome.tls if asked.proto in TLS_PROTOCOLS else outcome.plain
            if side is not None:
                return _read(side, asked)
        if outcome.to_proxy or self._catch_all(asked.port):
            return Verdict(False, PROXY, "host_not_allowed")
        return Verdict(False, KERNEL, "no_route")

    def _catch_all(self, port: int) -> bool:
        return any(one.http and one.kind is Kind.NAME and one.low == port for one in self._facts)

    def _udp(self, outcome: PortOutcome) -> Verdict:
        if outcome.udp is not None:
            if outcome.udp.deny:
                return Verdict(False, KERNEL, "rule_deny", outcome.udp.rule)
            return Verdict(True, KERNEL, "name_route", outcome.udp.rule)
        if outcome.quic and self._http3 and outcome.tls is not None:
            return Verdict(True, KERNEL, "name_route", outcome.tls.rules[0].rule)
        return Verdict(False, KERNEL, "no_route")

    # -- addresses ---------------------------------------------------------------------------

    def _address(self, asked: _Asked) -> Verdict:
        network = asked.destination.network
        if network is None or network.num_addresses != 1:
            raise InvalidInput(f'host "{asked.host}" has to be a name or one address')
        address = network.network_address
        if address.version == 6 and not self._ipv6:
            return Verdict(False, KERNEL, "ipv6_unrouted")
        if address.is_loopback:
            return Verdict(True, KERNEL, "loopback")
        if any(address in reserved for reserved in self._reserved):
            return Verdict(False, KERNEL, "no_route")
        l4 = UDP if asked.proto == "udp" else TCP
        here = [one for one in self._facts if _covers(one, address) and one.low <= asked.port <= one.high]
        here = [one for one in here if l4 in transports(one)]
        if l4 == UDP and any(one.udp for one in here):
            here = [one for one in here if one.udp or one.every_protocol]
        if not here:
            proxied = l4 == TCP and self._catch_all(asked.port)
            return Verdict(False, PROXY, "host_not_allowed") if proxied else Verdict(False, KERNEL, "no_route")
        winner = max(here, key=lambda one: (specificity(one), one.kind is Kind.ADDRESS))
        if winner.deny:
            return Verdict(False, KERNEL, "rule_deny", winner.rule)
        if winner.kind is Kind.CIDR or not winner.http or winner.passthrough:
            return Verdict(True, KERNEL, "address_rule", winner.rule)
        if asked.proto not in HTTP_FAMILY:
            return Verdict(False, PROXY, "host_not_allowed", None)
        same = [one for one in here if one.http and not one.deny and specificity(one) == specificity(winner)]
        side = _address_side([one for one in same if one.tls is (asked.proto in TLS_PROTOCOLS)])
        return _read(side, asked) if side is not None else Verdict(False, PROXY, "host_not_allowed")

    # -- near miss ---------------------------------------------------------------------------

    def _near_miss(self, asked: _Asked) -> NearMiss | None:
        """Return the allow with the fewest differences, ties by specificity."""
        found = [
            *((_differences(one, asked), one) for one in self._facts if not one.every_protocol),
            *(((*_differences(one, asked), self._why_not(one)), one) for one in self._others),
        ]
        found = [entry for entry in found if entry[0] and len(entry[0]) < 4]
        if not found:
            return None
        differences, facts = min(found, key=lambda entry: (len(entry[0]), _negative(specificity(entry[1]))))
        return NearMiss(facts.rule, tuple(differences))

    def _why_not(self, facts: Facts) -> str:
        return "expired" if facts.id in self._expired else "scope"


def _fill(request: Request) -> _Asked:
    proto = normalise_proto(request.proto)
    if proto not in PROTOCOLS:
        raise InvalidInput(f'proto "{request.proto}" is not one of https, http, ws, wss, tcp, ssh, udp')
    if not 0 <= request.port <= MAX_PORT:
        raise InvalidInput(f"port {request.port} is outside 1..{MAX_PORT}")
    try:
        destination = parse_destination(request.host.strip().lower().strip("[]"))
    except DestinationError as problem:
        raise InvalidInput(f'host "{request.host}" {problem}') from problem
    if destination.wildcard or destination.kind is Kind.CIDR:
        raise InvalidInput(f'host "{request.host}" has to be a name or one address')
    path = request.path or "/"
    if not path.startswith("/"):
        raise InvalidInput(f'path "{path}" has to begin with /')
    port = request.port or effective_ports(proto, "")[0]
    return _Asked(destination, proto, port, (request.method or "GET").upper(), path)


def _read(side: Side, asked: _Asked) -> Verdict:
    """Judge a request that the proxy reads."""
    if side.denied_by is not None:
        return Verdict(False, PROXY, "rule_deny", side.denied_by.rule)
    if side.passthrough:
        return Verdict(True, PROXY, "forwarded", side.rules[0].rule)
    upgrade = asked.proto in ("ws", "wss")
    policy = side.ws if upgrade else side.http or side.ws
    if policy is None:
        return Verdict(False, PROXY, "request_refused")
    verdict: PathVerdict = judge(policy, asked.method, asked.path)
    rule = next((one.rule for one in side.rules if one.id == policy.rule_id), None)
    return Verdict(verdict.allowed, PROXY, verdict.reason, rule, verdict.entry)


def _address_side(rules: list[Facts]) -> Side | None:
    if not rules:
        return None
    ordinary = [one for one in rules if not one.websocket]
    upgrades = [one for one in rules if one.websocket]
    return Side(
        (0, 0),
        http=path_policy(ordinary) if ordinary else None,
        ws=path_policy(upgrades) if upgrades else None,
        rules=tuple(rules),
    )


def _covers(facts: Facts, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    network = facts.destination.network
    return network is not None and address in network


def _negative(rank: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(-part for part in rank)


def _differences(facts: Facts, asked: _Asked) -> tuple[str, ...]:
    """Say in which respects a rule does not speak for what was asked; () = it does."""
    found: list[str] = []
    if not _speaks_for_host(facts, asked.destination):
        found.append("name")
    if not facts.low <= asked.port <= facts.high:
        found.append("port")
    same = facts.rule.proto == asked.proto or {facts.rule.proto, asked.proto} == {"tcp", "ssh"}
    if not same:
        found.append("proto")
    if facts.deny:
        found.append("action")
    elif facts.http and asked.proto in HTTP_FAMILY and facts.rule.path_rules:
        found += _path_differences(facts, asked)
    return tuple(found)


def _path_differences(facts: Facts, asked: _Asked) -> list[str]:
    verdict = judge(path_policy([facts]), asked.method, asked.path)
    if verdict.allowed:
        return []
    path = asked.path.partition("?")[0]
    for_others = any(matches(e.path, path) and e.action == "allow" and e.methods for e in facts.rule.path_rules)
    return ["method"] if for_others and not verdict.entry else ["path"]


def _speaks_for_host(facts: Facts, destination: Destination) -> bool:
    if facts.kind is not Kind.NAME or destination.kind is not Kind.NAME:
        inner = destination.network
        return inner is not None and _covers(facts, inner.network_address)
    if facts.base == destination.base:
        return True
    return (facts.destination.wildcard or facts.deny) and destination.base.endswith("." + facts.base)


def _command_parts(asked: _Asked, verdict: Verdict) -> dict[str, str]:
    if verdict.reason == "rule_deny" and verdict.rule is not None:
        return {"denied_by": verdict.rule.id}
    if verdict.reason == "path_denied":
        path = asked.path.partition("?")[0]
        return {"path": path, "method": asked.method if asked.method != "GET" else ""}
    return {}


def allow_command(
    host: str, proto: str, port: int, agent: str, *, path: str = "", method: str = "", denied_by: str = ""
) -> str:
    """Write the command that would allow a refused request, or end the deny that refused it."""
    if denied_by:
        return f"clawkerctl rules delete {denied_by}"
    parts: Iterable[str] = (
        f"clawkerctl allow {_shell(host)} --proto {proto} --port {port}",
        f" --path {_shell(path)}" if path else "",
        f" --method {_shell(method)}" if method else "",
        f" --agent {agent} --for 20m",
    )
    return "".join(parts)


def _shell(text: str) -> str:
    """Quote for a POSIX shell where needed; paths come from agents and are pasted by operators."""
    safe = text and all(character.isalnum() or character in "/._-~" for character in text) and text.isascii()
    return text if safe and not text.startswith("~") else "'" + text.replace("'", "'\\''") + "'"
