"""Tests of the generated clusters."""

from __future__ import annotations

from clawker_cp.testing.plan_world import build, rule
from clawker_cp.testing.proxy_config import read, resources_of


def test_names_are_resolved_by_the_gate_only() -> None:
    """Every resolver in the configuration is the proxy view, without search domains."""
    rules = (rule("https://a.example.com"), rule("tcp://b.example.com:22"), rule("https://c.org", tls="passthrough"))
    for cluster in read(resources_of(build(*rules)), "cds.json"):
        config = cluster["cluster_type"]["typed_config"]
        config = config.get("dns_cache_config", config)
        resolver = config["typed_dns_resolver_config"]["typed_config"]

        assert [one["socket_address"]["address"] for one in resolver["resolvers"]] == ["127.0.0.1"]
        assert resolver["resolvers"][0]["socket_address"]["port_value"] == 9953
        assert resolver["dns_resolver_options"]["no_default_search_domain"] is True
        assert config["dns_lookup_family"] == "V4_ONLY"


def test_tls_to_origins_is_verified_and_never_resumed() -> None:
    """System roots and the name; insecure clusters accept any issuer but still compare the name."""
    clusters = {one["name"]: one for one in read(resources_of(build()), "cds.json")}
    for name in ("https_dfp", "https_dfp_insecure", "wss_dfp", "wss_dfp_insecure"):
        tls = clusters[name]["transport_socket"]["typed_config"]
        options = clusters[name]["typed_extension_protocol_options"]
        (http,) = options.values()

        assert tls["max_session_keys"] == 0
        assert http["upstream_http_protocol_options"] == {"auto_sni": True, "auto_san_validation": True}
        validation = tls["common_tls_context"]["validation_context"]
        assert "trusted_ca" in validation
        assert (validation.get("trust_chain_verification") == "ACCEPT_UNTRUSTED") == name.endswith("insecure")
        assert ("h2" in tls["common_tls_context"]["alpn_protocols"]) == name.startswith("https")


def test_a_destination_that_means_this_machine_has_no_endpoint() -> None:
    """tcp://localhost is a cluster that dials nothing."""
    clusters = {one["name"]: one for one in read(resources_of(build(rule("tcp://localhost:5432"))), "cds.json")}

    assert clusters["tcp_localhost_5432"]["load_assignment"]["endpoints"] == []
