"""
Rules, verdicts and what was applied, between wire messages and the firewall's values. Pure.
"""

from __future__ import annotations

from clawker_cp._proto.clawker.admin.v1 import admin_pb2
from clawker_cp._proto.clawker.control.v1 import control_pb2
from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.changes import Applied
from clawker_cp.firewall.check import NearMiss, Verdict
from clawker_cp.firewall.effective import EffectiveRule
from clawker_cp.firewall.rules import GLOBAL, PathRule, Rule

_TLS = {
    control_pb2.TLS_MODE_AUTO: "auto",
    control_pb2.TLS_MODE_INSPECT: "inspect",
    control_pb2.TLS_MODE_PASSTHROUGH: "passthrough",
}
_TLS_NUMBER = {word: number for number, word in _TLS.items()}
_LAYERS = {
    "kernel": control_pb2.LAYER_KERNEL,
    "dns": control_pb2.LAYER_DNS,
    "proxy": control_pb2.LAYER_PROXY,
}
MAX_UNIX_S = 253402300799  # the end of year 9999, as RFC 3339 can write it


def rule_from_egress(message: admin_pb2.EgressRule, scope: str = GLOBAL) -> Rule:
    """
    Read the released message; whether such a rule may be is not judged here.
    """
    return Rule(
        dst=message.dst,
        proto=message.proto,
        port=message.port,
        action=message.action,
        path_rules=tuple(PathRule(one.path, one.action, tuple(one.methods)) for one in message.path_rules),
        path_default=message.path_default,
        insecure_skip_tls_verify=message.insecure_skip_tls_verify,
        scope=scope,
    )


def egress_from_rule(rule: Rule) -> admin_pb2.EgressRule:
    """
    Write a rule as the released message, without what only this server knows.
    """
    return admin_pb2.EgressRule(
        dst=rule.dst,
        proto=rule.proto,
        port=rule.port,
        action=rule.action,
        path_rules=[admin_pb2.PathRule(path=p.path, action=p.action, methods=p.methods) for p in rule.path_rules],
        path_default=rule.path_default,
        insecure_skip_tls_verify=rule.insecure_skip_tls_verify,
    )


def rule_from_control(message: control_pb2.Rule, index: int) -> Rule:
    """
    Read our own message. Raises `InvalidInput` naming the rule's index and the field.
    """
    if message.tls not in _TLS:
        raise InvalidInput(f"rules[{index}].tls: {message.tls} is not a TlsMode")
    if not 0 <= message.expires_at_unix <= MAX_UNIX_S:
        raise InvalidInput(f"rules[{index}].expires_at_unix: {message.expires_at_unix} is no time")
    rule = rule_from_egress(message.egress, message.scope or GLOBAL)
    return Rule(
        dst=rule.dst,
        proto=rule.proto,
        port=rule.port,
        action=rule.action,
        path_rules=rule.path_rules,
        path_default=rule.path_default,
        insecure_skip_tls_verify=rule.insecure_skip_tls_verify,
        tls=_TLS[message.tls],
        # proto3 cannot tell false from absent: absent is "not said".
        allow_private=True if message.allow_private else None,
        comment=message.comment,
        scope=rule.scope,
        expires_at=float(message.expires_at_unix),
    )


def control_from_rule(rule: Rule, last_hit_unix: int = 0) -> control_pb2.Rule:
    """
    Write a rule with everything that is known of it.
    """
    return control_pb2.Rule(
        id=rule.id,
        scope=rule.scope,
        egress=egress_from_rule(rule),
        tls=_TLS_NUMBER.get(rule.tls, control_pb2.TLS_MODE_AUTO),
        allow_private=bool(rule.allow_private),
        expires_at_unix=int(rule.expires_at),
        comment=rule.comment,
        source=rule.source or "file",
        created_at_unix=rule.created_at,
        last_hit_unix=last_hit_unix,
    )


def applied_message(applied: Applied | None) -> control_pb2.Applied | None:
    """
    What a change did; None stays None.
    """
    if applied is None:
        return None
    return control_pb2.Applied(
        version=applied.version,
        live=applied.live,
        apply_us=applied.apply_us,
        agents=applied.agents,
        connections_cut=applied.connections_cut,
    )


def effective_message(effective: EffectiveRule) -> control_pb2.EffectiveRule:
    """
    One rule as it holds for an agent.
    """
    return control_pb2.EffectiveRule(
        rule=control_from_rule(effective.rule),
        spans=[control_pb2.PortSpan(low=low, high=high, l4=l4) for low, high, l4 in effective.spans],
        overridden_by=effective.overridden_by,
        address_level=effective.address_level,
        path_default=effective.path_default,
    )


def verdict_message(verdict: Verdict, *, policy: int, version: int) -> control_pb2.Verdict:
    """
    The answer to "may it reach that".
    """
    return control_pb2.Verdict(
        allowed=verdict.allowed,
        layer=_LAYERS[verdict.layer],
        reason=verdict.reason,
        rule=control_from_rule(verdict.rule) if verdict.rule is not None else None,
        path_rule=verdict.path_rule,
        near_miss=_near_miss(verdict.near_miss) if verdict.near_miss is not None else None,
        allow_command=verdict.allow_command,
        policy=policy,
        version=version,
    )


def _near_miss(near: NearMiss) -> control_pb2.NearMiss:
    return control_pb2.NearMiss(rule=control_from_rule(near.rule), differences=near.differences)
