"""
Virtual hosts and routes of one policy (contract 7.7, 8.4): who may ask what of whom.

Pure. Every route carries `filter_metadata.clawker` = action, reason, rule, which is what access
records and refusals name. A host that no virtual host takes ends at `deny_all`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import orjson

from clawker_cp.firewall.paths import refused_form
from clawker_cp.firewall.plan import UDP, DeniedHost, HttpOrigin, PathEntry, PathPolicy, Policy

Json = dict[str, Any]

TYPE = "type.googleapis.com/envoy."

# Set from the TLS handshake before routing, taken off again towards the origin.
SNI_HEADER = "x-clawker-sni"

# What the connection manager would tell the origin about us; nobody asked it to.
NOT_FORWARDED = (SNI_HEADER, "x-forwarded-proto", "x-envoy-external-address", "x-envoy-internal")

DEFAULT_PORTS = {True: 443, False: 80}

# Headers by which some origins judge another path or method than the one that was sent.
OVERRIDES = ("x-original-url", "x-rewrite-url", "x-http-method-override", "x-http-method", "x-method-override")

# The names an authority may have below a wildcard: nothing that two parsers could read differently.
_PLAIN_AUTHORITY = r"[A-Za-z0-9._-]+(?::[0-9]{1,5})?"

# Names of this host itself, and addresses: what a learning agent may not name as a host (R12).
HERE = r"(?i)(?:(?:.*\.)?localhost\.?|[0-9.]+|0x[0-9a-fx.]*|\[.*|.*:.*:.*)(?::[0-9]*)?"


def _metadata(action: str, reason: str, rule: str) -> Json:
    return {"filter_metadata": {"clawker": {"action": action, "reason": reason, "rule": rule}}}


def _refuse(match: Json, reason: str, rule: str, status: int = 403) -> Json:
    return {"match": match, "direct_response": {"status": status}, "metadata": _metadata("denied", reason, rule)}


def _forward(match: Json, cluster: str, rule: str, *, upgrade: bool = False) -> Json:
    action: Json = {"cluster": cluster, "timeout": "0s"}
    if upgrade:
        action["upgrade_configs"] = [{"upgrade_type": "websocket", "enabled": True}]
    return {"match": match, "route": action, "metadata": _metadata("allowed", "forwarded", rule)}


_ANY_PATH: Json = {"prefix": "/"}

# An upgrade is what the connection manager takes for one: both headers. HTTP/2's extended CONNECT
# arrives here in the same form. Upgrades that no such route takes are refused by the manager.
_WEBSOCKET: list[Json] = [
    {"name": "upgrade", "string_match": {"exact": "websocket", "ignore_case": True}},
    {"name": "connection", "string_match": {"contains": "upgrade", "ignore_case": True}},
]


def _with(match: Json, headers: Iterable[Json]) -> Json:
    found = [*headers]
    return {**match, "headers": [*match.get("headers", ()), *found]} if found else match


def _path_match(pattern: str) -> Json:
    """Match a pattern against the path without its query: open prefix, or RE2 on the whole."""
    if pattern.startswith("~"):
        return {"safe_regex": {"regex": pattern[1:]}}
    return {"prefix": pattern}


def _methods(entry: PathEntry) -> list[Json]:
    if not entry.methods:
        return []
    expression = "(?i)(?:" + "|".join(re.escape(method) for method in entry.methods) + ")"
    return [{"name": ":method", "string_match": {"safe_regex": {"regex": expression}}}]


def _judge(policy: PathPolicy, cluster: str, headers: list[Json], *, upgrade: bool) -> Iterator[Json]:
    """Yield the routes of one kind of request, in the order of contract 7.7."""
    rule = policy.rule_id
    if policy.denied:
        yield _refuse(_with(_ANY_PATH, headers), "rule_deny", rule)
        return
    if policy.reads_paths:
        expression = f"(?s).*(?:{refused_form(policy.entries)}).*"
        yield _refuse(_with({"safe_regex": {"regex": expression}}, headers), "path_not_canonical", rule)
        for name in OVERRIDES:
            yield _refuse(_with(_ANY_PATH, [*headers, {"name": name, "present_match": True}]), "request_refused", rule)
    for entry in policy.entries:
        match = _with(_path_match(entry.pattern), [*headers, *_methods(entry)])
        if entry.allow:
            yield _forward(match, cluster, rule, upgrade=upgrade)
        else:
            yield _refuse(match, "path_denied", rule)
    rest = _with(_ANY_PATH, headers)
    if policy.default_allow:
        yield _forward(rest, cluster, rule, upgrade=upgrade)
    else:
        yield _refuse(rest, "path_denied", rule)


def cluster_of(*, tls: bool, upgrade: bool, insecure: bool) -> str:
    """Return the cluster that dials origins of a kind."""
    if not tls:
        return "http_dfp"
    return ("wss_dfp" if upgrade else "https_dfp") + ("_insecure" if insecure else "")


def origin_routes(origin: HttpOrigin) -> Iterator[Json]:
    """Yield the routes of an origin: upgrades first, then all other requests."""

    def cluster(policy: PathPolicy, *, upgrade: bool) -> str:
        return cluster_of(tls=origin.tls, upgrade=upgrade, insecure=policy.insecure or origin.insecure)

    if origin.ws is not None:
        yield from _judge(origin.ws, cluster(origin.ws, upgrade=True), _WEBSOCKET, upgrade=True)
    ordinary = origin.http or origin.ws
    if ordinary is not None:
        yield from _judge(ordinary, cluster(ordinary, upgrade=False), [], upgrade=False)


_NOBODY = PathPolicy("", (), default_allow=False)


def is_here(name: str) -> bool:
    """
    Whether a name means this host whatever a resolver says of it.

    The resolver library answers for `localhost` without asking anybody, so a rule for it would
    open this host's own loopback (R12).
    """
    return name == "localhost" or name.endswith(".localhost")


def _sni_check(base: str, wildcard: bool) -> Json:
    """Refuse a Host that is not what the TLS session was made for; a missing SNI counts as empty."""
    if wildcard:
        wanted: Json = {"safe_regex": {"regex": rf"(?i)(?:.*\.)?{re.escape(base)}"}}
    else:
        wanted = {"exact": base, "ignore_case": True}
    header = {
        "name": SNI_HEADER,
        "string_match": wanted,
        "invert_match": True,
        "treat_missing_header_as_empty": True,
    }
    return _refuse(_with(_ANY_PATH, [header]), "sni_mismatch", "", 421)


def _authority_check(rule: str) -> Json:
    header = {
        "name": ":authority",
        "string_match": {"safe_regex": {"regex": _PLAIN_AUTHORITY}},
        "invert_match": True,
    }
    return _refuse(_with(_ANY_PATH, [header]), "request_refused", rule)


def _domains(base: str, wildcard: bool, port: int, *, tls: bool, apex: bool) -> list[str]:
    names = [f"*.{base}"] if wildcard else [base]
    if wildcard and apex:
        names.append(base)
    found = [f"{name}:{port}" for name in names]
    if port == DEFAULT_PORTS[tls]:
        found += names
    return found


def address_host(base: str) -> str:
    """Return an address as it stands in a Host header."""
    return f"[{base}]" if ":" in base else base


@lru_cache(maxsize=16384)
def _origin_host(origin: HttpOrigin, stem: str, apex: bool, alternative: bool) -> orjson.Fragment:
    """
    Return the virtual host of an origin as JSON.

    Remembered, since the next build has the same origins but for the few that changed.
    """
    rule = (origin.http or origin.ws or _NOBODY).rule_id
    routes = [_sni_check(origin.base, origin.wildcard)] if origin.tls else []
    if origin.wildcard:
        routes.append(_authority_check(rule))
    if is_here(origin.base):
        routes.append(_refuse(_ANY_PATH, "host_not_allowed", rule))
    else:
        routes += origin_routes(origin)
    name = f"{stem}_{origin.port}"
    host: Json = {
        "name": f"wildcard_{name}" if origin.wildcard else name,
        "domains": _domains(origin.base, origin.wildcard, origin.port, tls=origin.tls, apex=apex),
        "routes": routes,
    }
    if alternative:
        host["response_headers_to_add"] = alternative_service(origin.port)
    return orjson.Fragment(orjson.dumps(host))


class VirtualHosts:
    """The virtual hosts of one policy and side (TLS or plain)."""

    def __init__(self, policy: Policy, stems: Mapping[str, str], *, tls: bool, quic_port_of: bool) -> None:
        self._policy = policy
        self._stems = stems
        self._tls = tls
        self._quic = quic_port_of and tls
        self._origins = [one for one in policy.origins if one.tls is tls and not one.is_address]
        self._denied = [one for one in policy.denied_hosts if one.tls in (None, tls)]
        self._udp = {(target.dst, target.port) for target in policy.opaque if target.l4 == UDP}
        # An exact entry of a base owns its apex, also if that entry is passed through unread.
        self._apex = {(one.base, one.port) for one in self._origins if not one.wildcard}
        self._apex |= {(one.base, port) for one in self._denied if not one.wildcard for port in self._ports(one)}
        if tls:
            self._apex |= {(one.base, one.port) for one in policy.passthrough if not one.wildcard}
        # The port all origins have HTTP/3 on, so that it can be said once; None = said per origin.
        ports = {origin.port for origin in self._origins}
        same = self._quic and len(ports) == 1 and not self._udp and not self._denied
        self.common_quic_port = next(iter(ports)) if same else None

    def build(self) -> list[Json | orjson.Fragment]:
        """Return all virtual hosts, `deny_all` last."""
        hosts: list[Json | orjson.Fragment] = [self._origin(one) for one in self._origins]
        for one in self._denied:
            hosts += self._denial(one)
        hosts += [self._everything()]
        return hosts

    def _ports(self, denied: DeniedHost) -> tuple[int, ...]:
        if denied.ports and 0 not in denied.ports:
            return denied.ports
        return tuple(sorted({*self._policy.http_ports, DEFAULT_PORTS[self._tls]}))

    def _origin(self, origin: HttpOrigin) -> orjson.Fragment:
        apex = (origin.base, origin.port) not in self._apex
        told = self._quic and self.common_quic_port is None and (origin.base, origin.port) not in self._udp
        return _origin_host(origin, self._stems[origin.base], apex, told)

    def _denial(self, denied: DeniedHost) -> Iterator[Json]:
        kind = "deny_wildcard" if denied.wildcard else "deny"
        for position, port in enumerate(self._ports(denied)):
            name = f"{kind}_{self._stems[denied.base]}" + (f"_{port}" if position else "")
            apex = (denied.base, port) not in self._apex
            routes = [_sni_check(denied.base, denied.wildcard)] if self._tls else []
            routes.append(_refuse(_ANY_PATH, "rule_deny", denied.rule_id))
            yield {
                "name": f"{name}_{denied.rule_id.removeprefix('r-')}",
                "domains": _domains(denied.base, denied.wildcard, port, tls=self._tls, apex=apex),
                "routes": routes,
            }

    def _everything(self) -> Json:
        routes: list[Json] = []
        if self._policy.learn and not self._tls:
            here = {"name": ":authority", "string_match": {"safe_regex": {"regex": HERE}}}
            routes.append(_refuse(_with(_ANY_PATH, [here]), "host_not_allowed", ""))
            routes.append(_authority_check(""))
            routes.append(_forward(_with(_ANY_PATH, _WEBSOCKET), "http_dfp", "", upgrade=True))
            routes.append(_forward(_ANY_PATH, "http_dfp", ""))
        else:
            routes.append(_refuse(_ANY_PATH, "host_not_allowed", ""))
        return {"name": "deny_all", "domains": ["*"], "routes": routes}


def alternative_service(port: int) -> list[Json]:
    """Return the header that tells clients of HTTP/3 on a port."""
    header = {"key": "alt-svc", "value": f'h3=":{port}"; ma=86400'}
    return [{"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]


def route_config(name: str, hosts: Sequence[Json | orjson.Fragment], *, quic_port: int | None = None) -> Json:
    """Return a route configuration as it stands in a file or inside a listener."""
    added = {"response_headers_to_add": alternative_service(quic_port)} if quic_port else {}
    return {
        **added,
        "name": name,
        "virtual_hosts": list(hosts),
        "request_headers_to_remove": list(NOT_FORWARDED),
        "validate_clusters": False,
        "ignore_port_in_host_matching": False,
    }


def address_route_config(name: str, origin: HttpOrigin) -> Json:
    """Return the routes of an address listener: the address itself as Host, nothing else (D31)."""
    rule = (origin.http or origin.ws or _NOBODY).rule_id
    host = {
        "name": "address",
        "domains": _domains(address_host(origin.base), False, origin.port, tls=origin.tls, apex=False),
        "routes": list(origin_routes(origin)),
    }
    refused = {"name": "deny_all", "domains": ["*"], "routes": [_refuse(_ANY_PATH, "host_not_allowed", rule)]}
    return route_config(name, [host, refused])
