"""Tests of the generated listeners."""

from __future__ import annotations

import orjson

from clawker_cp.testing.plan_world import build, deny, rule
from clawker_cp.testing.proxy_config import read, resources_of


def test_listeners_are_named_and_bound_as_the_contract_says() -> None:
    """Egress and HTTP/3 listener per policy, dedicated ones per destination; all on the proxy address."""
    resources = resources_of(
        build(rule("https://a.example.com"), rule("tcp://db.example.com:5432"), rule("udp://t.example:123"))
    )
    listeners = {one["name"]: one for one in read(resources, "lds.json")}

    assert set(listeners) == {"egress_p1", "egress_quic_p1", "tcp_db_example_com_5432", "udp_t_example_123"}
    assert {one["address"]["socket_address"]["address"] for one in listeners.values()} == {"10.231.80.1"}
    egress = listeners["egress_p1"]
    assert egress["enable_reuse_port"] is False
    assert egress["listener_filters_timeout"] == "1s"
    assert egress["continue_on_listener_filters_timeout"] is False
    assert [chain["name"] for chain in egress["filter_chains"]] == ["inspect", "plain"]
    assert "default_filter_chain" not in egress
    assert {one["name"] for one in read(resources, "cds.json")} >= {
        "http_dfp",
        "https_dfp",
        "https_dfp_insecure",
        "wss_dfp",
        "wss_dfp_insecure",
        "tcp_db_example_com_5432",
        "udp_t_example_123",
    }


def test_names_below_a_wildcard_passthrough_have_a_chain_that_reads_them() -> None:
    """What a rule inspects or denies never reaches the chain that passes bytes on."""
    rules = (
        rule("https://*.example.com", tls="passthrough"),
        rule("https://api.example.com/v1"),
        deny("https://bad.example.com"),
    )
    listeners = {one["name"]: one for one in read(resources_of(build(*rules)), "lds.json")}
    chains = {one["name"]: one["filter_chain_match"] for one in listeners["egress_p1"]["filter_chains"]}

    assert set(chains["inspect_names"]["server_names"]) >= {"api.example.com", "bad.example.com"}
    assert set(chains["pass_wildcard_example_com"]["server_names"]) == {"*.example.com", "example.com"}


def test_the_server_name_header_is_ours_alone() -> None:
    """It is taken off what the agent sent before it is set, on every listener that reads requests."""
    listeners = read(resources_of(build(rule("https://a.example.com"), rule("https://192.0.2.1"))), "lds.json")
    text = orjson.dumps(listeners).decode()

    assert text.count('{"remove":"x-clawker-sni"}') == text.count('"key":"x-clawker-sni"') == 4


def test_nothing_of_the_request_is_rewritten() -> None:
    """Paths, ids, underscores and server headers stay as they are; no client counts as internal."""
    listeners = read(resources_of(build(rule("https://a.example.com"))), "lds.json")
    manager = listeners[0]["filter_chains"][0]["filters"][1]["typed_config"]

    assert (manager["normalize_path"], manager["merge_slashes"]) == (False, False)
    assert manager["path_with_escaped_slashes_action"] == "KEEP_UNCHANGED"
    assert manager["generate_request_id"] is False
    assert manager["server_header_transformation"] == "PASS_THROUGH"
    assert manager["internal_address_config"] == {"unix_sockets": False}
    assert manager["common_http_protocol_options"]["headers_with_underscores_action"] == "ALLOW"
