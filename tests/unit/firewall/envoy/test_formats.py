"""Tests of access records and refusal bodies."""

from __future__ import annotations

from clawker_cp.firewall.envoy import formats

ALWAYS = {
    "server.address", "client.address", "listener_ip", "network.peer.address", "network.peer.port", "response_flags",
    "bytes_sent", "bytes_received", "upstream_bytes_sent", "upstream_bytes_received", "duration_ms",
    "tls.protocol.version", "tls.cipher", "tls.established", "upstream_tls_version", "upstream_tls_cipher",
    "network.transport", "network.protocol.name", "action", "event_id", "policy", "reason", "rule", "downstream_remote",
}  # fmt: skip
HTTP = {
    "method", "path", "response_code", "response_code_details", "user_agent", "req_duration_ms", "resp_duration_ms",
    "resp_tx_duration_ms", "upstream_transport_failure_reason", "network.protocol.version",
}  # fmt: skip


def _fields(log: list[dict[str, object]]) -> set[str]:
    config = log[0]["typed_config"]
    assert isinstance(config, dict)
    return set(config["log_format"]["json_format"])


def test_records_have_the_keys_of_the_contract() -> None:
    """Every kind of record has what is always there; HTTP has its own on top."""
    http = _fields(formats.http_log("/x", policy=1, tls=True))
    others = [
        _fields(formats.passthrough_log("/x", policy=1, port=443, rule="r-1")),
        _fields(formats.opaque_log("/x", policy=1, dst="a", port=22, transport="tcp", rule="r-1")),
        _fields(formats.unmatched_log("/x", policy=1)),
    ]

    assert http >= ALWAYS | HTTP
    for fields in others:
        assert fields >= ALWAYS


def test_refusals_have_the_keys_of_the_contract_in_order() -> None:
    """One body for each kind of error, the path without its query, the hint with the event id."""
    config = formats.local_replies()
    bodies = [mapper["body_format_override"]["json_format"] for mapper in config["mappers"]]
    bodies.append(config["body_format"]["json_format"])
    keys = ["details", "error", "event_id", "hint", "host", "method", "path", "reason", "rule", "status"]

    assert {body["error"] for body in bodies} == {"egress_denied", "origin_error", "request_refused"}
    for body in bodies:
        assert list(body) == keys
        assert body["path"].startswith("%PATH(NQ:")
        assert body["hint"] == f"clawkerctl explain {body['event_id']}"
