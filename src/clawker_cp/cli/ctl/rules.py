"""
Rules with scopes: `allow`, `deny`, `rules list|put|delete|effective`, `check`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from clawker_cp.adminclient.messages import admin, control
from clawker_cp.cli.ctl.session import Session, agent_ref, enum_word, moment, scope_of, seconds_of, table
from clawker_cp.errors import InvalidInput
from clawker_cp.firewall.documents import read_rules_file
from clawker_cp.firewall.rules import Rule
from clawker_cp.firewall.shorthand import parse_rule_shorthand

REASON = "allowed with clawkerctl"
_TLS: dict[str, Any] = {"auto": 0, "inspect": 1, "passthrough": 2}
_OUTCOMES = {0: "-", 1: "added", 2: "modified", 3: "unchanged"}


def _rule_options(command: Any) -> Any:
    for option in (
        click.option("--agent", default="", help="Only for this agent: project/agent, or /agent."),
        click.option("--project", default="", help="Only for agents of this project."),
        click.option("--proto", default="", help="Protocol, if RULE is a bare destination."),
        click.option("--port", default="", help="Port or range, if RULE is a bare destination."),
        click.option("--path", default="", help="Only this path (a prefix, or ~ and a pattern)."),
        click.option("--method", multiple=True, help="Only this method; may be repeated."),
        click.option(
            "--tls", type=click.Choice(sorted(_TLS)), default="auto", help="Read https requests, or pass them."
        ),
        click.option("--comment", default="", help="Why; at most 200 characters."),
        click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing."),
    ):
        command = option(command)
    return command


@click.command("allow")
@click.argument("rule")
@_rule_options
@click.option("--for", "duration", default="", help="Only for a time, like 20m; needs --agent.")
@click.pass_obj
def allow(session: Session, /, *, rule: str, duration: str, **options: Any) -> None:
    """
    Allow RULE: [METHOD ][proto://]dst[:port[-port]][/path].

    \b
    clawkerctl allow https://api.example.com
    clawkerctl allow 'GET https://api.example.com/v1' --agent shop/dev
    clawkerctl allow ssh://git.example.org --agent shop/dev --for 20m
    """
    wanted = _rule(rule, "allow", options)
    if not duration:
        _put(session, [wanted], dry_run=options["dry_run"])
        return
    if not options["agent"]:
        raise InvalidInput("--for: needs --agent; a rule for everybody is for good")
    request = control.GrantRequest(
        agent=agent_ref(options["agent"]),
        egress=wanted.egress,
        tls=wanted.tls,
        duration_seconds=seconds_of(duration),
        reason=options["comment"] or REASON,
    )
    answer = session.call("Grant", request)
    session.show(answer, lambda: [f"granted until {moment(answer.rule.expires_at_unix)}: {_text(answer.rule)}"])


@click.command("deny")
@click.argument("rule")
@_rule_options
@click.pass_obj
def deny(session: Session, /, *, rule: str, **options: Any) -> None:
    """
    Deny RULE, in the same form as `allow`; a deny beats an allow that is as specific.
    """
    _put(session, [_rule(rule, "deny", options)], dry_run=options["dry_run"])


@click.group("rules")
def rules() -> None:
    """
    Rules of all scopes: list, put from a file, delete, and what holds for one agent.
    """


@rules.command("list")
@click.option("--scope", default="", help="global, project:<p> or agent:<p>/<a>; all without it.")
@click.pass_obj
def list_rules(session: Session, /, *, scope: str) -> None:
    """
    Show rules, global ones first.
    """
    answer = session.call("ListRules", control.ListRulesRequest(scope=scope))
    rows = [
        (one.id, one.scope, one.egress.action, _text(one), one.source, moment(one.expires_at_unix),
         moment(one.last_hit_unix))
        for one in answer.rules
    ]  # fmt: skip
    session.show(answer, lambda: table(("ID", "SCOPE", "ACTION", "RULE", "SOURCE", "EXPIRES", "LAST HIT"), rows))


@rules.command("put")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--scope", default="global", help="Scope of rules that name none.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing.")
@click.pass_obj
def put(session: Session, /, *, file: Path, scope: str, dry_run: bool) -> None:
    """
    Add the rules of FILE (YAML, see docs/rules.md); all of them or none.
    """
    _put(session, [_message(rule) for rule in read_rules_file(file, scope=scope)], dry_run=dry_run)


@rules.command("delete")
@click.argument("ids", nargs=-1)
@click.option("--scope", default="", help="Every rule of a scope instead.")
@click.option("--dry-run", is_flag=True, help="Say what would go; delete nothing.")
@click.pass_obj
def delete(session: Session, /, *, ids: tuple[str, ...], scope: str, dry_run: bool) -> None:
    """
    Delete rules by id, or all of a scope. Exits 1 when an id is not known.
    """
    answer = session.call("DeleteRules", control.DeleteRulesRequest(ids=ids, scope=scope, dry_run=dry_run))
    verb = "would delete" if dry_run else "deleted"
    session.show(
        answer,
        lambda: [
            *(f"{verb} {one.id} {one.scope}: {one.egress.action} {_text(one)}" for one in answer.removed),
            *(f"unknown: {one}" for one in answer.not_found),
        ],
    )
    if answer.not_found:
        raise click.exceptions.Exit(1)


@rules.command("effective")
@click.argument("agent")
@click.pass_obj
def effective(session: Session, /, *, agent: str) -> None:
    """
    Show what holds for AGENT, most specific first, and what denials leave of each rule's ports.
    """
    answer = session.call("GetEffectiveRules", control.GetEffectiveRulesRequest(agent=agent_ref(agent)))
    session.show(answer, lambda: _effective_lines(answer))


@click.command("check")
@click.argument("target")
@click.option("--agent", default="", help="The agent that asks; without it only global rules count.")
@click.pass_obj
def check(session: Session, /, *, target: str, agent: str) -> None:
    """
    Say whether TARGET ([METHOD ][proto://]host[:port][/path]) may be reached, without trying it.

    Exits 1 when it may not.
    """
    asked = parse_rule_shorthand(target)
    path = asked.path_rules[0] if asked.path_rules else None
    request = control.CheckRequest(
        agent=agent_ref(agent) if agent else None,
        host=asked.dst,
        proto=asked.proto,
        port=int(asked.port) if asked.port.isdecimal() else 0,
        method=path.methods[0] if path is not None and path.methods else "",
        path=path.path if path is not None else "",
    )
    answer = session.call("Check", request)
    session.show(answer.verdict, lambda: verdict_lines(answer.verdict))
    if not answer.verdict.allowed:
        raise click.exceptions.Exit(1)


def verdict_lines(verdict: Any) -> Iterator[str]:
    """
    A verdict as people read it: who decided, why, what came close, and what would allow it.
    """
    word = "allowed" if verdict.allowed else "denied"
    layer = enum_word(verdict, "layer")
    yield f"{word} by {layer}: {verdict.reason} (policy {verdict.policy}, version {verdict.version})"
    if verdict.HasField("rule"):
        entry = f", path {verdict.path_rule}" if verdict.path_rule else ""
        rule = verdict.rule
        yield f"  rule {rule.id} {rule.scope}: {rule.egress.action} {_text(rule)}{entry}"
    if verdict.HasField("near_miss"):
        differs = ", ".join(verdict.near_miss.differences)
        yield f"  closest: {verdict.near_miss.rule.id} {_text(verdict.near_miss.rule)}, differs in {differs}"
    if verdict.allow_command:
        yield f"  to allow it: {verdict.allow_command}"


def _put(session: Session, messages: list[Any], *, dry_run: bool) -> None:
    answer = session.call("PutRules", control.PutRulesRequest(rules=messages, dry_run=dry_run))
    session.show(answer, lambda: _put_lines(answer, dry_run=dry_run))
    if any(one.problem for one in answer.outcomes):
        raise click.exceptions.Exit(1)


def _put_lines(answer: Any, *, dry_run: bool) -> Iterator[str]:
    for one in answer.outcomes:
        yield f"{one.id or '-'}  {one.problem or _OUTCOMES.get(one.status, '?')}"
    if dry_run:
        yield "nothing was written"
    elif answer.applied.version:
        live = "enforced" if answer.applied.live else "stored, not enforced yet"
        yield (
            f"version {answer.applied.version} {live} after {answer.applied.apply_us / 1000:.1f} ms, "
            f"{answer.applied.connections_cut} connections cut"
        )


def _effective_lines(answer: Any) -> Iterator[str]:
    yield f"policy {answer.policy}, version {answer.version}"
    if answer.quarantined:
        yield "quarantined: only the control plane is reached, whatever the rules say"
    if answer.bypass_until_unix:
        yield f"bypassed until {moment(answer.bypass_until_unix)}"
    rows = [
        (
            one.rule.egress.action,
            _text(one.rule),
            one.rule.scope,
            " ".join(f"{s.low}-{s.high}/{s.l4}" if s.low != s.high else f"{s.low}/{s.l4}" for s in one.spans) or "none",
            " ".join(one.overridden_by) or "-",
        )
        for one in answer.rules
    ]
    yield from table(("ACTION", "RULE", "SCOPE", "PORTS LEFT", "OVERRIDDEN BY"), rows)


def _rule(text: str, action: str, options: dict[str, Any]) -> Any:
    """One rule from its shorthand and options; an option that the text says too is a contradiction."""
    proto, port, path = options["proto"], options["port"], options["path"]
    if proto and "://" not in text:
        text = f"{proto}://{text}"
        proto = ""
    if port:
        text = f"{text}:{port}"
    if path:
        text = f"{text}{path}"
    if options["method"]:
        text = f"{','.join(options['method'])} {text}"
    if proto:
        raise InvalidInput("--proto: the rule names a protocol already")
    rule = parse_rule_shorthand(text, action, scope=scope_of(options["agent"], options["project"]))
    message = _message(rule)
    message.tls = _TLS[options["tls"]]
    message.comment = options["comment"]
    return message


def _message(rule: Rule) -> Any:
    paths = [admin.PathRule(path=one.path, action=one.action, methods=one.methods) for one in rule.path_rules]
    egress = admin.EgressRule(
        dst=rule.dst,
        proto=rule.proto,
        port=rule.port,
        action=rule.action,
        path_rules=paths,
        path_default=rule.path_default,
        insecure_skip_tls_verify=rule.insecure_skip_tls_verify,
    )
    return control.Rule(
        scope=rule.scope,
        egress=egress,
        tls=_TLS.get(rule.tls, 0),
        allow_private=bool(rule.allow_private),
        expires_at_unix=int(rule.expires_at),
        comment=rule.comment,
    )


def _text(rule: Any) -> str:
    egress = rule.egress
    port = f":{egress.port}" if egress.port else ""
    paths = f" ({len(egress.path_rules)} paths)" if egress.path_rules else ""
    return f"{egress.proto}://{egress.dst}{port}{paths}"
