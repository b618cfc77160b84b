"""
Clusters: how origins are dialled (contract 8.4). All names are resolved by the gate's proxy view.

Pure. HTTP origins share five dynamic forward-proxy clusters, so that a rule for a new name adds
none; every unread destination has one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clawker_cp.firewall.envoy.options import EnvoyOptions
from clawker_cp.firewall.envoy.routes import is_here
from clawker_cp.firewall.plan import TCP, OpaqueTarget, Passthrough

Json = dict[str, Any]
TYPE = "type.googleapis.com/envoy."

HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def _address(host: str, port: int, protocol: str = "TCP") -> Json:
    return {"socket_address": {"address": host, "port_value": port, "protocol": protocol}}


def resolver(options: EnvoyOptions) -> Json:
    """Return the resolver: the proxy view and nothing else, no search domains, no hosts file."""
    host, port = options.resolver
    return {
        "name": "envoy.network.dns_resolver.cares",
        "typed_config": {
            "@type": TYPE + "extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
            "resolvers": [_address(host, port, "UDP")],
            "dns_resolver_options": {"no_default_search_domain": True},
            "query_timeout_seconds": 8,
            "query_tries": 1,
        },
    }


def family(options: EnvoyOptions) -> str:
    """Return which addresses are asked for."""
    return "ALL" if options.ipv6 else "V4_ONLY"


def dns_cache(options: EnvoyOptions) -> Json:
    """Return the one cache that filters and clusters of the forward proxy share; all copies must be equal."""
    return {
        "name": "clawker_dfp",
        "dns_lookup_family": family(options),
        "typed_dns_resolver_config": resolver(options),
        "dns_query_timeout": "10s",
        "dns_refresh_rate": "60s",
        "dns_min_refresh_rate": "1s",
        "dns_failure_refresh_rate": {"base_interval": "1s", "max_interval": "10s"},
        "host_ttl": "300s",
        "max_hosts": 16384,
    }


def http_clusters(options: EnvoyOptions) -> list[Json]:
    """Return the clusters that HTTP origins share, and the one of passed-through wildcards."""
    clusters = [_forward_proxy("http_dfp", options, tls=False)]
    for insecure in (False, True):
        suffix = "_insecure" if insecure else ""
        clusters.append(_forward_proxy(f"https_dfp{suffix}", options, tls=True, insecure=insecure))
        clusters.append(_forward_proxy(f"wss_dfp{suffix}", options, tls=True, insecure=insecure, http1=True))
    clusters.append(_pass_proxy(options))
    return clusters


def _forward_proxy(name: str, options: EnvoyOptions, *, tls: bool, insecure: bool = False, http1: bool = False) -> Json:
    http: Json = {"@type": TYPE + "extensions.upstreams.http.v3.HttpProtocolOptions"}
    if tls and not http1:
        http["auto_config"] = {
            "http_protocol_options": {},
            "http2_protocol_options": {
                "initial_stream_window_size": 1 << 20,
                "initial_connection_window_size": 4 << 20,
            },
        }
    else:
        http["explicit_http_config"] = {"http_protocol_options": {}}
    http["common_http_protocol_options"] = {"idle_timeout": "60s", "max_headers_count": options.max_headers}
    if tls:
        http["upstream_http_protocol_options"] = {"auto_sni": True, "auto_san_validation": True}
    cluster: Json = {
        "name": name,
        "connect_timeout": "10s",
        "lb_policy": "CLUSTER_PROVIDED",
        "per_connection_buffer_limit_bytes": options.buffer_bytes,
        "cluster_type": {
            "name": "envoy.clusters.dynamic_forward_proxy",
            "typed_config": {
                "@type": TYPE + "extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig",
                "dns_cache_config": dns_cache(options),
                "allow_insecure_cluster_options": not tls,
            },
        },
        "circuit_breakers": _breakers(),
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http},
    }
    if tls:
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": _upstream_tls(options, insecure=insecure, http1=http1),
        }
    return cluster


def _upstream_tls(options: EnvoyOptions, *, insecure: bool, http1: bool) -> Json:
    validation: Json = {"trusted_ca": {"filename": str(options.roots)}}
    if insecure:
        # Any issuer; the name is still compared.
        validation["trust_chain_verification"] = "ACCEPT_UNTRUSTED"
    return {
        "@type": TYPE + "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        # A ticket of one host of a wildcard must not open a session with another.
        "max_session_keys": 0,
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
            "alpn_protocols": ["http/1.1"] if http1 else ["h2", "http/1.1"],
            "validation_context": validation,
        },
    }


def _pass_proxy(options: EnvoyOptions) -> Json:
    return {
        "name": "pass_dfp",
        "connect_timeout": "10s",
        "lb_policy": "CLUSTER_PROVIDED",
        "per_connection_buffer_limit_bytes": options.buffer_bytes,
        "cluster_type": {
            "name": "envoy.clusters.dynamic_forward_proxy",
            "typed_config": {
                "@type": TYPE + "extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig",
                "dns_cache_config": dns_cache(options),
                # The session is the agent's own; nothing is encrypted or verified here.
                "allow_insecure_cluster_options": True,
            },
        },
        "circuit_breakers": _breakers(),
    }


def _breakers() -> Json:
    # Envoy's own default of 1,024 is for one service; these clusters are the whole outside.
    limit = 16384
    return {
        "thresholds": [
            {"max_connections": limit, "max_pending_requests": limit, "max_requests": limit, "max_retries": 3}
        ]
    }


def opaque_name(target: OpaqueTarget, stem: str) -> str:
    """Return the name of the listener and of the cluster of an unread destination."""
    return f"{'tcp' if target.l4 == TCP else 'udp'}_{stem}_{target.port}"


def opaque_cluster(target: OpaqueTarget, stem: str, options: EnvoyOptions) -> Json:
    """Return the cluster of an unread destination."""
    return _single(opaque_name(target, stem), target.dst, target.port, options, is_address=target.is_address)


def passthrough_name(passed: Passthrough, stem: str) -> str:
    """Return the name of the cluster of an exact passed-through name."""
    return f"pass_{stem}_{passed.port}"


def passthrough_cluster(passed: Passthrough, stem: str, options: EnvoyOptions) -> Json:
    """Return the cluster of an exact passed-through name."""
    return _single(passthrough_name(passed, stem), passed.base, passed.port, options, is_address=False)


def _single(name: str, host: str, port: int, options: EnvoyOptions, *, is_address: bool) -> Json:
    endpoint = {"endpoint": {"address": _address(host, port)}}
    cluster: Json = {
        "name": name,
        "connect_timeout": "10s",
        "per_connection_buffer_limit_bytes": options.buffer_bytes,
        "circuit_breakers": _breakers(),
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    if is_here(host):
        return {**cluster, "type": "STATIC", "load_assignment": {"cluster_name": name, "endpoints": []}}
    if is_address:
        return {**cluster, "type": "STATIC"}
    # What used to be called LOGICAL_DNS: one address of the answer, connections outlive its change.
    cluster["cluster_type"] = {
        "name": "envoy.clusters.dns",
        "typed_config": {
            "@type": TYPE + "extensions.clusters.dns.v3.DnsCluster",
            "all_addresses_in_single_endpoint": True,
            "dns_lookup_family": family(options),
            "typed_dns_resolver_config": resolver(options),
            "respect_dns_ttl": True,
            "dns_refresh_rate": "30s",
            "dns_failure_refresh_rate": {"base_interval": "1s", "max_interval": "10s"},
        },
    }
    # One name that does not resolve must not hold up the start of everything else.
    cluster["wait_for_warm_on_init"] = False
    return cluster


def plan_clusters(
    opaque: Iterator[tuple[OpaqueTarget, str]], passed: Iterator[tuple[Passthrough, str]], options: EnvoyOptions
) -> list[Json]:
    """Return all clusters of a plan, each once, in name order after the shared ones."""
    own = {cluster["name"]: cluster for cluster in (opaque_cluster(one, stem, options) for one, stem in opaque)}
    for one, stem in passed:
        if not one.wildcard:
            cluster = passthrough_cluster(one, stem, options)
            own[cluster["name"]] = cluster
    return [*http_clusters(options), *(own[name] for name in sorted(own))]
