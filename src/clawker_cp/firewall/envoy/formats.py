"""
What Envoy writes about traffic: access records (contract 8.5) and the body of refusals (8.4).

Pure: fragments of configuration. Who reads the records is `access_log.py`.
"""

from __future__ import annotations

from typing import Any

EVENT_ID = "p-%CONNECTION_ID%-%START_TIME(%s%9f)%"

# A path may be as long as the header limit; the record of it need not.
_PATH = "%PATH(NQ:PATH):2048%"

_ALWAYS = {
    "client.address": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%",
    "listener_ip": "%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%",
    "listener_port": "%DOWNSTREAM_LOCAL_PORT%",
    "network.peer.address": "%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
    "network.peer.port": "%UPSTREAM_REMOTE_PORT%",
    "response_flags": "%RESPONSE_FLAGS%",
    "bytes_sent": "%BYTES_SENT%",
    "bytes_received": "%BYTES_RECEIVED%",
    "upstream_bytes_sent": "%UPSTREAM_WIRE_BYTES_SENT%",
    "upstream_bytes_received": "%UPSTREAM_WIRE_BYTES_RECEIVED%",
    "duration_ms": "%DURATION%",
    "tls.protocol.version": "%DOWNSTREAM_TLS_VERSION%",
    "tls.cipher": "%DOWNSTREAM_TLS_CIPHER%",
    "upstream_tls_version": "%UPSTREAM_TLS_VERSION%",
    "upstream_tls_cipher": "%UPSTREAM_TLS_CIPHER%",
    "event_id": EVENT_ID,
    "start_time_ns": "%START_TIME(%s%9f)%",
    "downstream_remote": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
    "record": "%ACCESS_LOG_TYPE%",
}

_HTTP = {
    "server.address": "%REQUEST_HEADER(:AUTHORITY):512%",
    "tls.server_name": "%REQUESTED_SERVER_NAME%",
    "network.protocol.name": "http",
    "network.protocol.version": "%PROTOCOL%",
    "action": "%METADATA(ROUTE:clawker:action)%",
    "reason": "%METADATA(ROUTE:clawker:reason)%",
    "rule": "%METADATA(ROUTE:clawker:rule)%",
    "method": "%REQUEST_HEADER(:METHOD):64%",
    "path": _PATH,
    "upgrade": "%REQUEST_HEADER(UPGRADE):64%",
    "response_code": "%RESPONSE_CODE%",
    "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "user_agent": "%REQUEST_HEADER(USER-AGENT):512%",
    "req_duration_ms": "%REQUEST_DURATION%",
    "resp_duration_ms": "%RESPONSE_DURATION%",
    "resp_tx_duration_ms": "%RESPONSE_TX_DURATION%",
    "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
}


def _log(path: str, fields: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    config = {
        "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
        "path": path,
        "log_format": {"json_format": fields},
    }
    return [{"name": "envoy.access_loggers.file", "typed_config": config, **more}]


def http_log(path: str, *, policy: int, tls: bool, transport: str = "tcp") -> list[dict[str, Any]]:
    """Return the access log of a connection manager."""
    fields = {
        **_ALWAYS,
        **_HTTP,
        "policy": str(policy),
        "tls.established": "true" if tls else "false",
        "network.transport": transport,
    }
    return _log(path, fields)


def passthrough_log(path: str, *, policy: int, port: int, rule: str) -> list[dict[str, Any]]:
    """Return the access log of a chain that passes TLS on unread."""
    fields = {
        **_ALWAYS,
        **_verdict("allowed", "forwarded", rule),
        "server.address": "%REQUESTED_SERVER_NAME%",
        "server.port": str(port),
        "policy": str(policy),
        "tls.established": "false",
        "network.transport": "tcp",
        "network.protocol.name": "tls",
        "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    }
    return _log(path, fields)


def opaque_log(path: str, *, policy: int, dst: str, port: int, transport: str, rule: str) -> list[dict[str, Any]]:
    """Return the access log of a dedicated listener; `policy` 0 = several share it."""
    fields = {
        **_ALWAYS,
        **_verdict("allowed", "forwarded", rule),
        "server.address": dst,
        "server.port": str(port),
        "policy": str(policy),
        "tls.established": "false",
        "network.transport": transport,
        "network.protocol.name": transport,
        "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    }
    return _log(path, fields)


def unmatched_log(path: str, *, policy: int) -> list[dict[str, Any]]:
    """Return the log of a listener for connections that no chain takes (reset at once)."""
    fields = {
        **_ALWAYS,
        **_verdict("denied", "host_not_allowed", ""),
        "server.address": "%REQUESTED_SERVER_NAME%",
        "policy": str(policy),
        "tls.established": "false",
        "network.transport": "tcp",
        "network.protocol.name": "tcp",
    }
    return _log(path, fields, filter={"response_flag_filter": {"flags": ["NR"]}})


def _verdict(action: str, reason: str, rule: str) -> dict[str, Any]:
    return {"action": action, "reason": reason, "rule": rule}


def _body(error: str, reason: str, rule: str) -> dict[str, Any]:
    # Envoy writes the keys in text order, which is the order of the contract.
    return {
        "json_format": {
            "details": "%RESPONSE_CODE_DETAILS%",
            "error": error,
            "event_id": EVENT_ID,
            "hint": f"clawkerctl explain {EVENT_ID}",
            "host": "%REQUEST_HEADER(:AUTHORITY):512%",
            "method": "%REQUEST_HEADER(:METHOD):64%",
            "path": _PATH,
            "reason": reason,
            "rule": rule,
            "status": "%RESPONSE_CODE%",
        }
    }


def _status(operator: str, value: int) -> dict[str, Any]:
    comparison = {"op": operator, "value": {"default_value": value, "runtime_key": "clawker.unused"}}
    return {"status_code_filter": {"comparison": comparison}}


def local_replies() -> dict[str, Any]:
    """Return what answers of the proxy itself look like; answers of origins are never touched."""
    of_route = ("%METADATA(ROUTE:clawker:reason)%", "%METADATA(ROUTE:clawker:rule)%")
    upgrade = {
        "extension_filter": {
            "name": "envoy.access_loggers.extension_filters.cel",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                "expression": "response.code_details == 'upgrade_failed'"
                " && xds.route_metadata.filter_metadata['clawker']['action'] == 'allowed'",
            },
        }
    }
    refused_upgrade = {"and_filter": {"filters": [_status("EQ", 403), upgrade]}}
    return {
        "mappers": [
            # The route would have let an ordinary request pass; the manager refused the upgrade.
            {"filter": refused_upgrade, "body_format_override": _body("egress_denied", "request_refused", of_route[1])},
            {"filter": _status("EQ", 403), "body_format_override": _body("egress_denied", *of_route)},
            {
                "filter": _status("GE", 500),
                "body_format_override": _body("origin_error", "origin_error", of_route[1]),
            },
            # Of an upgrade alone: the origin took it for an ordinary request, and its success is none.
            {
                "filter": _status("LE", 399),
                "status_code": 502,
                "body_format_override": _body("origin_error", "origin_error", of_route[1]),
            },
            {"filter": _status("EQ", 421), "body_format_override": _body("request_refused", *of_route)},
        ],
        "body_format": _body("request_refused", "request_refused", of_route[1]),
    }
