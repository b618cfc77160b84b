"""
Listeners: one per policy, one per unread destination, one per HTTP address (contract 8.4).

Pure. What belongs to ordinary https and http rules stands in routes and secrets, so that such a
rule changes no listener.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clawker_cp.firewall.envoy import formats
from clawker_cp.firewall.envoy.clusters import TYPE, Json, dns_cache, opaque_name, passthrough_name
from clawker_cp.firewall.envoy.options import EnvoyOptions
from clawker_cp.firewall.envoy.routes import HERE, SNI_HEADER, address_route_config, is_here
from clawker_cp.firewall.inspection import SHARDS
from clawker_cp.firewall.plan import TCP, HttpOrigin, OpaqueTarget, Policy

# Envoy sends the record of a stream that begins through the same log (contract 8.5).
_AT_BEGIN = {"flush_access_log_on_new_request": True}
_AT_CONNECT = {"flush_access_log_on_connected": True}


def route_config_name(policy: int, *, tls: bool) -> str:
    """Return the name of a policy's route configuration; its file has the same with `.json`."""
    return f"rc_p{policy}_{'tls' if tls else 'plain'}"


def secret_name(policy: int, shard: int) -> str:
    """Return the name of a policy's certificate shard."""
    return f"p{policy}_s{shard}"


def secret_file(policy: int, shard: int) -> str:
    """Return the file a certificate shard is read from."""
    return f"sds-p{policy}-{shard}.json"


def quic_listener_name(policy: int) -> str:
    """Return the name of a policy's HTTP/3 listener."""
    return f"egress_quic_p{policy}"


def source(options: EnvoyOptions, file: str) -> Json:
    """Return a subscription to one file of the configuration directory."""
    return {"resource_api_version": "V3", "path_config_source": {"path": str(options.directory / file)}}


class Listeners:
    """Builds the listeners of one plan."""

    def __init__(self, options: EnvoyOptions, stems: Mapping[str, str]) -> None:
        self._options = options
        self._stems = stems
        self._log = str(options.access_log)

    # -- one policy --------------------------------------------------------------------------

    def egress(self, policy: Policy) -> Json:
        """Return the TCP listener of a policy."""
        inspected = self._inspect_chain(policy)
        if policy.learn:
            chains = [self._learn_chain(policy), {**inspected, "filter_chain_match": self._kept_names(policy)}]
        else:
            chains = [{**inspected, "filter_chain_match": {"transport_protocol": "tls"}}]
            if kept := self._kept_off(policy):
                match = {"transport_protocol": "tls", "server_names": kept}
                chains.append({**inspected, "name": "inspect_names", "filter_chain_match": match})
        chains += self._pass_chains(policy)
        plain = self._http(policy.id, self._subscribed(policy.id, tls=False), tls=False)
        chains.append({"name": "plain", "filter_chain_match": {"transport_protocol": "raw_buffer"}, "filters": plain})
        listener = self._tcp(f"egress_p{policy.id}", policy.egress_port, chains, inspector=True)
        listener["access_log"] = formats.unmatched_log(self._log, policy=policy.id)
        return listener

    def quic(self, policy: Policy) -> Json:
        """Return the HTTP/3 listener of a policy; same routes, same secrets."""
        tls = {
            "@type": TYPE + "extensions.transport_sockets.quic.v3.QuicDownstreamTransport",
            "downstream_tls_context": self._downstream_tls(self._secrets(policy.id), ["h3"]),
        }
        chain = {
            "name": "quic",
            "filters": [
                self._manager(policy.id, self._subscribed(policy.id, tls=True), tls=True, quic=True),
            ],
            "transport_socket": {"name": "envoy.transport_sockets.quic", "typed_config": tls},
        }
        return {
            "name": quic_listener_name(policy.id),
            "address": self._address(policy.egress_port, "UDP"),
            # UDP cannot be handed from worker to worker: each needs its own socket.
            "enable_reuse_port": True,
            "udp_listener_config": {
                "quic_options": {
                    "quic_protocol_options": {
                        "max_concurrent_streams": 100,
                        "initial_stream_window_size": 1 << 20,
                        "initial_connection_window_size": 4 << 20,
                    },
                    "idle_timeout": "300s",
                },
                "downstream_socket_config": {"prefer_gro": False},
            },
            "filter_chains": [chain],
            "per_connection_buffer_limit_bytes": self._options.buffer_bytes,
        }

    def _kept_off(self, policy: Policy) -> list[str]:
        """Return the server names that a wildcard passthrough would take from the inspecting chain."""
        bases = [one.base for one in policy.passthrough if one.wildcard]
        if not bases:
            return []
        taken = {name for one in policy.passthrough for name in _server_names(one.base, one.wildcard)}
        names = set()
        for base, wildcard in _read_names(policy):
            if any(base == other or base.endswith(f".{other}") for other in bases):
                names |= set(_server_names(base, wildcard))
        return sorted(names - taken)

    def _kept_names(self, policy: Policy) -> Json:
        """Return what a learning policy still reads: everything a rule names."""
        taken = {name for one in policy.passthrough for name in _server_names(one.base, one.wildcard)}
        names = {name for base, wildcard in _read_names(policy) for name in _server_names(base, wildcard)}
        return {"transport_protocol": "tls", "server_names": sorted(names - taken) or ["none.invalid"]}

    def _inspect_chain(self, policy: Policy) -> Json:
        return {
            "name": "inspect",
            "filters": self._http(policy.id, self._subscribed(policy.id, tls=True), tls=True),
            "transport_socket": self._tls_socket(self._secrets(policy.id)),
            "transport_socket_connect_timeout": "10s",
        }

    def _pass_chains(self, policy: Policy) -> list[Json]:
        exact = {(one.base, one.port) for one in policy.passthrough if not one.wildcard}
        exact_bases = {base for base, _ in exact} | {base for base, wildcard in _read_names(policy) if not wildcard}
        chains = []
        for one in policy.passthrough:
            stem = self._stems[one.base]
            log = formats.passthrough_log(self._log, policy=policy.id, port=one.port, rule=one.rule_id)
            if one.wildcard and is_here(one.base):
                continue
            if one.wildcard:
                names = [f"*.{one.base}"] + ([one.base] if one.base not in exact_bases else [])
                filters = [self._sni_proxy(one.port), self._tcp_proxy("pass_dfp", log, f"pass_{stem}")]
            else:
                names = [one.base]
                cluster = passthrough_name(one, stem)
                filters = [self._tcp_proxy(cluster, log, cluster)]
            name = f"pass_wildcard_{stem}" if one.wildcard else f"pass_{stem}"
            match = {"transport_protocol": "tls", "server_names": names}
            filters = [self._connection_limit(f"egress_p{policy.id}"), *filters]
            chains.append({"name": name, "filter_chain_match": match, "filters": filters})
        return chains

    def _learn_chain(self, policy: Policy) -> Json:
        """Return the chain that passes every name on by SNI (R38), this host's own names apart (R12)."""
        log = formats.passthrough_log(self._log, policy=policy.id, port=443, rule="")
        here = {"requested_server_name": {"safe_regex": {"regex": HERE}}}
        nameless = {"requested_server_name": {"exact": ""}}
        guard = {
            "name": "envoy.filters.network.rbac",
            "typed_config": {
                "@type": TYPE + "extensions.filters.network.rbac.v3.RBAC",
                "stat_prefix": f"egress_p{policy.id}",
                "rules": {
                    "action": "DENY",
                    "policies": {
                        "here": {
                            "permissions": [{"or_rules": {"rules": [here, nameless]}}],
                            "principals": [{"any": True}],
                        }
                    },
                },
            },
        }
        filters = [
            self._connection_limit(f"egress_p{policy.id}"),
            guard,
            self._sni_proxy(443),
            self._tcp_proxy("pass_dfp", log, f"learn_p{policy.id}"),
        ]
        return {"name": "pass_learn", "filter_chain_match": {"transport_protocol": "tls"}, "filters": filters}

    # -- dedicated listeners -----------------------------------------------------------------

    def opaque(self, target: OpaqueTarget, policy: int) -> Json:
        """Return the listener of an unread destination; `policy` 0 = several policies share it."""
        name = opaque_name(target, self._stems[target.dst])
        transport = "tcp" if target.l4 == TCP else "udp"
        log = formats.opaque_log(
            self._log, policy=policy, dst=target.dst, port=target.port, transport=transport, rule=target.rule_id
        )
        if target.l4 == TCP:
            filters = [self._connection_limit(name), self._tcp_proxy(name, log, name)]
            return self._tcp(name, target.listen, [{"name": "opaque", "filters": filters}], inspector=False)
        config = {
            "@type": TYPE + "extensions.filters.udp.udp_proxy.v3.UdpProxyConfig",
            "stat_prefix": name,
            "matcher": {
                "on_no_match": {
                    "action": {
                        "name": "route",
                        "typed_config": {
                            "@type": TYPE + "extensions.filters.udp.udp_proxy.v3.Route",
                            "cluster": name,
                        },
                    }
                }
            },
            "idle_timeout": "60s",
            "access_log": log,
        }
        return {
            "name": name,
            "address": self._address(target.listen, "UDP"),
            "enable_reuse_port": True,
            "udp_listener_config": {"downstream_socket_config": {"max_rx_datagram_size": 9000}},
            "listener_filters": [{"name": "envoy.filters.udp_listener.udp_proxy", "typed_config": config}],
        }

    def address(self, origins: Iterable[HttpOrigin], policy: int, leaf: Mapping[str, str]) -> Json:
        """
        Return the listener of an HTTP address rule: TLS and plain of one (address, port).

        `leaf` has `cert`, `key` (paths) and `mark`, which changes with the certificate.
        """
        chains = []
        first: HttpOrigin | None = None
        for origin in origins:
            first = origin
            kind = "tls" if origin.tls else "plain"
            routes = {"route_config": address_route_config(f"rc_p{policy}_addr_{kind}", origin)}
            chain: Json = {
                "name": "inspect" if origin.tls else "plain",
                "filter_chain_match": {"transport_protocol": "tls" if origin.tls else "raw_buffer"},
                "filters": self._http(policy, routes, tls=origin.tls),
            }
            if origin.tls:
                certificate = {
                    "certificate_chain": {"filename": leaf["cert"]},
                    "private_key": {"filename": leaf["key"]},
                }
                chain["name"] = f"inspect_{leaf['mark']}"
                chain["transport_socket"] = self._tls_socket({"tls_certificates": [certificate]})
                chain["transport_socket_connect_timeout"] = "10s"
            chains.append(chain)
        assert first is not None
        stem = self._stems[first.base]
        return self._tcp(f"addr_p{policy}_{stem}_{first.port}", first.listen, chains, inspector=True)

    def health(self) -> Json:
        """Return the listener that answers 200 `ok` to everything (contract 8.7)."""
        route = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "ok"}}}
        manager = {
            "@type": TYPE + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "health",
            "route_config": {
                "name": "health",
                "virtual_hosts": [{"name": "health", "domains": ["*"], "routes": [route]}],
            },
            "http_filters": [_router()],
        }
        chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        return {
            "name": "health",
            "address": self._address(self._options.health_port),
            "enable_reuse_port": False,
            "ignore_global_conn_limit": True,
            "filter_chains": [chain],
        }

    # -- parts -------------------------------------------------------------------------------

    def _address(self, port: int, protocol: str = "TCP") -> Json:
        return {"socket_address": {"address": self._options.proxy_addr, "port_value": port, "protocol": protocol}}

    def _tcp(self, name: str, port: int, chains: list[Json], *, inspector: bool) -> Json:
        listener: Json = {
            "name": name,
            "address": self._address(port),
            "enable_reuse_port": False,
            "filter_chains": chains,
            "per_connection_buffer_limit_bytes": self._options.buffer_bytes,
        }
        if inspector:
            config = {"@type": TYPE + "extensions.filters.listener.tls_inspector.v3.TlsInspector"}
            listener["listener_filters"] = [{"name": "envoy.filters.listener.tls_inspector", "typed_config": config}]
            # Nobody who says nothing gets a connection by waiting (R11).
            listener["listener_filters_timeout"] = "1s"
            listener["continue_on_listener_filters_timeout"] = False
        return listener

    def _secrets(self, policy: int) -> Json:
        return {
            "tls_certificate_sds_secret_configs": [
                {
                    "name": secret_name(policy, shard),
                    "sds_config": source(self._options, secret_file(policy, shard)),
                }
                for shard in range(SHARDS)
            ]
        }

    def _downstream_tls(self, certificates: Json, alpn: list[str]) -> Json:
        return {
            "common_tls_context": {
                **certificates,
                "alpn_protocols": alpn,
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
            }
        }

    def _tls_socket(self, certificates: Json) -> Json:
        context = {
            "@type": TYPE + "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            **self._downstream_tls(certificates, ["h2", "http/1.1"]),
        }
        return {"name": "envoy.transport_sockets.tls", "typed_config": context}

    def _subscribed(self, policy: int, *, tls: bool) -> Json:
        name = route_config_name(policy, tls=tls)
        return {"rds": {"route_config_name": name, "config_source": source(self._options, f"{name}.json")}}

    def _http(self, policy: int, routes: Json, *, tls: bool) -> list[Json]:
        return [self._connection_limit(f"egress_p{policy}"), self._manager(policy, routes, tls=tls)]

    def _connection_limit(self, stat_prefix: str) -> Json:
        config = {
            "@type": TYPE + "extensions.filters.network.connection_limit.v3.ConnectionLimit",
            "stat_prefix": stat_prefix,
            "max_connections": self._options.max_connections_per_listener,
        }
        return {"name": "envoy.filters.network.connection_limit", "typed_config": config}

    def _manager(self, policy: int, routes: Json, *, tls: bool, quic: bool = False) -> Json:
        options = self._options
        config: Json = {
            "@type": TYPE + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": f"egress_p{policy}",
            "codec_type": "HTTP3" if quic else "AUTO",
            **routes,
            "http_filters": [self._forward_proxy_filter(), _router()],
            "access_log": formats.http_log(
                str(options.access_log), policy=policy, tls=tls, transport="quic" if quic else "tcp"
            ),
            "access_log_options": _AT_BEGIN,
            "local_reply_config": formats.local_replies(),
            # The header is ours whatever the agent sends: taken off, then set from the handshake.
            "early_header_mutation_extensions": [_sni_header()],
            "use_remote_address": True,
            "skip_xff_append": True,
            # No client is "internal": x-envoy headers of agents mean nothing.
            "internal_address_config": {"unix_sockets": False},
            "generate_request_id": False,
            "preserve_external_request_id": True,
            "server_header_transformation": "PASS_THROUGH",
            "normalize_path": False,
            "merge_slashes": False,
            "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
            "upgrade_configs": [{"upgrade_type": "websocket", "enabled": False}],
            "stream_idle_timeout": "0s",
            "request_headers_timeout": "60s",
            "drain_timeout": "1s",
            "delayed_close_timeout": "1s",
            "max_request_headers_kb": options.max_header_kb,
            "common_http_protocol_options": {
                "idle_timeout": "3600s",
                "max_headers_count": options.max_headers,
                "headers_with_underscores_action": "ALLOW",
            },
        }
        if not quic:
            config["http2_protocol_options"] = {
                "max_concurrent_streams": 100,
                "initial_stream_window_size": 1 << 20,
                "initial_connection_window_size": 4 << 20,
                "allow_connect": True,
            }
        return {"name": "envoy.filters.network.http_connection_manager", "typed_config": config}

    def _forward_proxy_filter(self) -> Json:
        config = {
            "@type": TYPE + "extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig",
            "dns_cache_config": dns_cache(self._options),
        }
        return {"name": "envoy.filters.http.dynamic_forward_proxy", "typed_config": config}

    def _sni_proxy(self, port: int) -> Json:
        config = {
            "@type": TYPE + "extensions.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig",
            "port_value": port,
            "dns_cache_config": dns_cache(self._options),
        }
        return {"name": "envoy.filters.network.sni_dynamic_forward_proxy", "typed_config": config}

    def _tcp_proxy(self, cluster: str, log: list[Json], stat_prefix: str) -> Json:
        config = {
            "@type": TYPE + "extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": stat_prefix,
            "cluster": cluster,
            # An agent that says nothing on a connection may have a server that says nothing too.
            "idle_timeout": "0s",
            "access_log": log,
            "access_log_options": _AT_CONNECT,
        }
        return {"name": "envoy.filters.network.tcp_proxy", "typed_config": config}


def _server_names(base: str, wildcard: bool) -> list[str]:
    return [f"*.{base}", base] if wildcard else [base]


def _read_names(policy: Policy) -> list[tuple[str, bool]]:
    """Return the names whose TLS the proxy ends, to serve or to refuse."""
    names = [(one.base, one.wildcard) for one in policy.origins if one.tls and not one.is_address]
    return names + [(one.base, one.wildcard) for one in policy.denied_hosts if one.tls is not False]


def _router() -> Json:
    config: dict[str, Any] = {
        "@type": TYPE + "extensions.filters.http.router.v3.Router",
        "suppress_envoy_headers": True,
    }
    return {"name": "envoy.filters.http.router", "typed_config": config}


def _sni_header() -> Json:
    mutations = [
        {"remove": SNI_HEADER},
        {
            "append": {
                "header": {"key": SNI_HEADER, "value": "%REQUESTED_SERVER_NAME%"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        },
    ]
    config = {
        "@type": TYPE + "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
        "mutations": mutations,
    }
    return {"name": "envoy.http.early_header_mutation.header_mutation", "typed_config": config}
