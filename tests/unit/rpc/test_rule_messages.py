"""Rules over the wire: what goes out comes back, and what cannot be meant is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from clawker_cp._proto.clawker.admin.v1 import admin_pb2
from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.changes import Applied
from clawker_cp.firewall.check import Checker, Request
from clawker_cp.firewall.effective import listing
from clawker_cp.firewall.rules import PathRule, Rule, normalise
from clawker_cp.rpc.rule_messages import (
    applied_message,
    control_from_rule,
    effective_message,
    egress_from_rule,
    rule_from_control,
    rule_from_egress,
    verdict_message,
)

RULE = normalise(
    Rule(
        "api.example.com", "https", "8443", "allow", (PathRule("/v1", "allow", ("GET", "PUT")),), "deny", True,
        "inspect", True, "why", "control", 7, "project:shop", 99.0,
    )
)  # fmt: skip


def test_the_released_message_keeps_every_field() -> None:
    """Out and in again over bytes: everything that the released schema knows is the same."""
    wire = admin_pb2.EgressRule.FromString(egress_from_rule(RULE).SerializeToString())
    back = normalise(rule_from_egress(wire, "project:shop"))
    for field in ("dst", "proto", "port", "action", "path_rules", "path_default", "insecure_skip_tls_verify", "scope"):
        assert getattr(back, field) == getattr(RULE, field), field


def test_our_message_keeps_ours_too() -> None:
    """TLS mode, private addresses, comment and expiry survive; id, source and times are told."""
    wire = control_pb2.Rule.FromString(control_from_rule(RULE, 5).SerializeToString())
    back = normalise(rule_from_control(wire, 0))
    assert (back.tls, back.allow_private, back.comment, back.expires_at) == ("inspect", True, "why", 99.0)
    assert (wire.id, wire.source, wire.created_at_unix, wire.last_hit_unix) == (RULE.id, "control", 7, 5)


def test_an_empty_scope_is_global_and_an_absent_flag_says_nothing() -> None:
    """Absent fields are "not said", so that merging keeps what is stored."""
    rule = rule_from_control(control_pb2.Rule(egress=admin_pb2.EgressRule(dst="x.example")), 0)
    assert (rule.scope, rule.allow_private, rule.tls, rule.expires_at) == ("global", None, "auto", 0.0)


@pytest.mark.parametrize(("field", "value"), [("tls", 9), ("expires_at_unix", -1), ("expires_at_unix", 1 << 60)])
def test_values_outside_their_range_are_named(field: str, value: Any) -> None:
    """The error has the rule's index and the field."""
    with pytest.raises(InvalidInput, match=rf"rules\[3\]\.{field}"):
        rule_from_control(control_pb2.Rule(**{field: value}), 3)


def test_a_rule_of_a_hand_edited_file_says_so() -> None:
    """A stored rule without a source came from the file."""
    assert control_from_rule(normalise(Rule("x.example"))).source == "file"


def test_a_verdict_carries_rule_near_miss_and_command() -> None:
    """A refusal names the layer, the nearest rule and what to type."""
    rules = [normalise(Rule("api.example.com", path_rules=(PathRule("/ok"),)))]
    verdict = Checker(rules, agent="p/a").check(Request("api.example.com", path="/secret"))
    message = verdict_message(verdict, policy=3, version=8)
    assert (message.allowed, message.layer, message.reason) == (False, control_pb2.LAYER_PROXY, "path_denied")
    assert (message.policy, message.version, message.rule.id) == (3, 8, rules[0].id)
    assert "--path /secret" in message.allow_command
    missed = verdict_message(Checker(rules).check(Request("other.example")), policy=1, version=1)
    assert list(missed.near_miss.differences) == ["name", "path"] and not missed.HasField("rule")


def test_effective_rules_and_applied_go_out_whole() -> None:
    """Spans, overriding rules and the numbers of a change; no change is no message."""
    rules = [normalise(Rule("x.example", "tcp", "10-20")), normalise(Rule("x.example", "tcp", "15", "deny"))]
    messages = [effective_message(one) for one in listing(rules)]
    allow = next(one for one in messages if one.rule.egress.action == "allow")
    assert [(span.low, span.high, span.l4) for span in allow.spans] == [(10, 14, "tcp"), (16, 20, "tcp")]
    assert list(allow.overridden_by) == [rules[1].id]
    applied = applied_message(Applied(4, live=True, apply_us=5, agents=6, connections_cut=7))
    assert applied == control_pb2.Applied(version=4, live=True, apply_us=5, agents=6, connections_cut=7)
    assert applied_message(None) is None
