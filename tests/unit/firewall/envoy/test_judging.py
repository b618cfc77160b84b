"""Tests of the configuration that is only judged."""

from __future__ import annotations

import orjson

from clawker_cp.firewall.envoy.judging import static_configuration
from clawker_cp.testing.plan_world import build, rule
from clawker_cp.testing.proxy_config import OPTIONS, resources_of


def test_nothing_is_left_to_subscriptions() -> None:
    """Routes, secrets, listeners and clusters all stand in the one document."""
    resources = resources_of(build(rule("https://a.example.com"), rule("tcp://b.example.com:22")))
    text = static_configuration(resources, OPTIONS)
    document = orjson.loads(text)

    assert b"path_config_source" not in text
    assert b'"rds"' not in text
    assert "dynamic_resources" not in document
    static = document["static_resources"]
    assert {one["name"] for one in static["listeners"]} >= {"health", "egress_p1", "tcp_b_example_com_22"}
    assert {one["name"] for one in static["secrets"]} == {"p1_s0", "p1_s1"}
    assert b"a.example.com:443" in text
