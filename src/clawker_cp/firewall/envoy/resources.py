"""
A plan as files for Envoy: bootstrap, LDS, CDS, RDS and SDS (contract 8.4). Pure.

Each file is a list of resources; its version and how it reaches the disk are `files.py`'s
business. Policies that did not change since the last build are taken over as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from clawker_cp.firewall.envoy.clusters import TYPE, Json, plan_clusters
from clawker_cp.firewall.envoy.listeners import (
    Listeners,
    quic_listener_name,
    route_config_name,
    secret_file,
    secret_name,
    source,
)
from clawker_cp.firewall.envoy.options import EnvoyOptions
from clawker_cp.firewall.envoy.routes import VirtualHosts, route_config
from clawker_cp.firewall.envoy.stems import assign_stems
from clawker_cp.firewall.inspection import SHARDS, Leaf
from clawker_cp.firewall.plan import UDP, HttpOrigin, OpaqueTarget, Passthrough, Plan, Policy

LDS = "lds.json"
CDS = "cds.json"

LISTENER = TYPE + "config.listener.v3.Listener"
CLUSTER = TYPE + "config.cluster.v3.Cluster"
ROUTES = TYPE + "config.route.v3.RouteConfiguration"
SECRET = TYPE + "extensions.transport_sockets.tls.v3.Secret"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """
    One configuration file: its resources as serialised JSON values, in order, by resource name.

    `stat` is the prefix of the statistics that acknowledge it, `secret` that only we may read it.
    """

    resources: Mapping[str, bytes]
    stat: str
    secret: bool = False
    digest: bytes = b""

    def document(self, version: int) -> bytes:
        """Return the file's content."""
        head = b'{"version_info":"%d","resources":[\n' % version
        return head + b",\n".join(self.resources.values()) + b"\n]}\n"


@dataclass(frozen=True, slots=True)
class PolicyFiles:
    """What one policy contributes; kept for the next build."""

    policy: Policy
    with_quic: bool
    stems: Mapping[str, str]
    leaves: tuple[Leaf, ...]
    files: Mapping[str, ConfigFile]
    listeners: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Resources:
    """
    All files of one plan by file name.

    `opaque` are the names of clusters whose first address the acknowledgement waits for.
    """

    files: Mapping[str, ConfigFile]
    stems: Mapping[str, str]
    opaque: frozenset[str] = frozenset()
    parts: Mapping[int, PolicyFiles] = field(default_factory=dict, compare=False, repr=False)


def bootstrap(options: EnvoyOptions) -> bytes:
    """Return the bootstrap configuration; equal options give equal bytes."""
    monitors = [
        {
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": TYPE + "extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": options.max_connections,
            },
        },
        {
            "name": "envoy.resource_monitors.fixed_heap",
            "typed_config": {
                "@type": TYPE + "extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                "max_heap_size_bytes": options.max_heap_bytes,
            },
        },
    ]
    actions = [
        {"name": f"envoy.overload_actions.{name}", "triggers": [_above("envoy.resource_monitors.fixed_heap", level)]}
        for name, level in (
            ("shrink_heap", 0.85),
            ("stop_accepting_requests", 0.95),
            ("stop_accepting_connections", 0.98),
        )
    ]
    document = {
        "node": {"id": "clawker", "cluster": "clawker"},
        "admin": {"address": {"pipe": {"path": str(options.admin_socket), "mode": 0o600}}},
        "dynamic_resources": {"lds_config": source(options, LDS), "cds_config": source(options, CDS)},
        "static_resources": {"listeners": [Listeners(options, {}).health()]},
        "overload_manager": {
            "refresh_interval": "1s",
            "resource_monitors": monitors,
            "actions": actions,
        },
        "stats_config": {"stats_tags": [], "use_all_default_tags": False},
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2)


def _above(monitor: str, value: float) -> Json:
    return {"name": monitor, "threshold": {"value": value}}


def build_resources(
    plan: Plan,
    leaves: Mapping[str, Leaf],
    options: EnvoyOptions,
    previous: Resources | None = None,
) -> Resources:
    """
    Turn a plan into files.

    `leaves` are keyed by secret name (`p1_s0`) and, for addresses, `addr-<address>`; a missing
    one raises `KeyError`. `previous` keeps stems and makes it faster. Takes milliseconds per
    hundred changed names: call it through a thread.
    """
    stems = assign_stems(_destinations(plan), previous.stems if previous else None)
    known = previous.parts if previous else {}
    listeners = Listeners(options, stems)
    files: dict[str, ConfigFile] = {}
    parts: dict[int, PolicyFiles] = {}
    own: dict[str, bytes] = {}
    quic = {port.policy for port in plan.proxy_ports if port.l4 == UDP and _is_egress(plan, port.policy, port.port)}
    for number, policy in sorted(plan.policies.items()):
        part = _policy_files(policy, number in quic and options.http3, stems, leaves, options, known.get(number))
        parts[number] = part
        files.update(part.files)
        own.update(part.listeners)
    opaque = _opaque(plan)
    for target, sharing in opaque:
        resource = listeners.opaque(target, sharing)
        own[resource["name"]] = _dump(LISTENER, resource)
    passed = _passed(plan)
    clusters = plan_clusters(
        ((target, stems[target.dst]) for target, _ in opaque), ((one, stems[one.base]) for one in passed), options
    )
    packed = {one["name"]: _dump(CLUSTER, one) for one in clusters}
    files[CDS] = _file(packed, "cluster_manager.cds")
    files[LDS] = _file({name: own[name] for name in sorted(own)}, "listener_manager.lds")
    waiting = frozenset(one["name"] for one in clusters if "load_assignment" in one and "cluster_type" in one)
    return Resources(files, stems, waiting, parts)


def _destinations(plan: Plan) -> Iterator[str]:
    for policy in plan.policies.values():
        yield from (one.base for one in policy.origins)
        yield from (one.base for one in policy.denied_hosts)
        yield from (one.base for one in policy.passthrough)
        yield from (one.dst for one in policy.opaque)


def _is_egress(plan: Plan, policy: int, port: int) -> bool:
    return policy in plan.policies and plan.policies[policy].egress_port == port


def _opaque(plan: Plan) -> list[tuple[OpaqueTarget, int]]:
    """Return every unread destination once, with the policy that has it (0 = several)."""
    found: dict[tuple[int, int], tuple[OpaqueTarget, int]] = {}
    for number, policy in sorted(plan.policies.items()):
        for target in policy.opaque:
            key = (target.l4, target.listen)
            known = found.get(key)
            found[key] = (known[0], 0) if known is not None else (target, number)
    return [found[key] for key in sorted(found)]


def _passed(plan: Plan) -> list[Passthrough]:
    return [one for policy in plan.policies.values() for one in policy.passthrough]


def _policy_files(
    policy: Policy,
    with_quic: bool,
    stems: Mapping[str, str],
    leaves: Mapping[str, Leaf],
    options: EnvoyOptions,
    known: PolicyFiles | None,
) -> PolicyFiles:
    own_stems = {base: stems[base] for base in _own_bases(policy)}
    needed = _own_leaves(policy, leaves)
    same = (policy, with_quic, own_stems, needed)
    if known is not None and (known.policy, known.with_quic, known.stems, known.leaves) == same:
        return known
    files: dict[str, ConfigFile] = {}
    for tls in (True, False):
        name = route_config_name(policy.id, tls=tls)
        hosts = VirtualHosts(policy, stems, tls=tls, quic_port_of=with_quic)
        resource = _dump(ROUTES, route_config(name, hosts.build(), quic_port=hosts.common_quic_port))
        files[f"{name}.json"] = _file({name: resource}, f"http.egress_p{policy.id}.rds.{name}")
    for shard in range(SHARDS):
        name = secret_name(policy.id, shard)
        files[secret_file(policy.id, shard)] = _file({name: _secret(name, leaves[name])}, f"sds.{name}", secret=True)
    builder = Listeners(options, stems)
    listeners = {f"egress_p{policy.id}": _dump(LISTENER, builder.egress(policy))}
    if with_quic:
        listeners[quic_listener_name(policy.id)] = _dump(LISTENER, builder.quic(policy))
    for origins in _address_origins(policy):
        leaf = _paths(leaves, origins)
        resource_json = builder.address(origins, policy.id, leaf)
        listeners[resource_json["name"]] = _dump(LISTENER, resource_json)
    return PolicyFiles(policy, with_quic, own_stems, needed, files, listeners)


def _own_bases(policy: Policy) -> set[str]:
    bases = {one.base for one in policy.origins} | {one.base for one in policy.denied_hosts}
    return bases | {one.base for one in policy.passthrough}


def _own_leaves(policy: Policy, leaves: Mapping[str, Leaf]) -> tuple[Leaf, ...]:
    names = [secret_name(policy.id, shard) for shard in range(SHARDS)]
    names += [f"addr-{one.base}" for one in policy.origins if one.is_address and one.tls]
    return tuple(leaves[name] for name in names)


def _address_origins(policy: Policy) -> list[list[HttpOrigin]]:
    by_listener: dict[int, list[HttpOrigin]] = {}
    for origin in policy.origins:
        if origin.is_address:
            by_listener.setdefault(origin.listen, []).append(origin)
    return list(by_listener.values())


def _paths(leaves: Mapping[str, Leaf], origins: list[HttpOrigin]) -> Mapping[str, str]:
    if not any(one.tls for one in origins):
        return {}
    leaf = leaves[f"addr-{origins[0].base}"]
    return {"cert": leaf.cert_path, "key": leaf.key_path, "mark": leaf.mark}


def _secret(name: str, leaf: Leaf) -> bytes:
    certificate = {
        "certificate_chain": {"inline_string": leaf.chain_pem},
        "private_key": {"inline_string": leaf.key_pem},
    }
    return _dump(SECRET, {"name": name, "tls_certificate": certificate})


def _dump(kind: str, resource: Any) -> bytes:
    return orjson.dumps({"@type": kind, **resource})


def _file(resources: Mapping[str, bytes], stat: str, *, secret: bool = False) -> ConfigFile:
    digest = hashlib.blake2b(digest_size=16)
    for resource in resources.values():
        digest.update(resource)
        digest.update(b"\n")
    return ConfigFile(resources, stat, secret, digest.digest())
