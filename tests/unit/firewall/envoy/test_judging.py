"""Tests of the configuration that is only judged."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from clawker_cp.errors import ClawkerError
from clawker_cp.firewall.envoy.judging import judge, static_configuration
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


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("kill -9 $$", "STACK_UNHEALTHY", "was killed while it judged"),
        ("echo first; echo no such route; exit 1", "RULE_INVALID", "no such route"),
        ("exit 1", "RULE_INVALID", "refused the change"),
    ],
)
async def test_a_judge_that_is_killed_has_refused_nothing(tmp_path: Path, script: str, code: str, said: str) -> None:
    """Its own end, as by the kernel for want of memory, is never told as a fault of the rule."""
    envoy = tmp_path / "envoy"
    envoy.write_text(f"#!/bin/sh\n{script}\n")
    envoy.chmod(0o755)
    with pytest.raises(ClawkerError, match=said) as refused:
        await judge(envoy, tmp_path / "configuration.json")
    assert refused.value.code == code
