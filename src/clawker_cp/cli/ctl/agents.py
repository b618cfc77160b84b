"""
Agents and what they do: `agents`, `bypass`, `quarantine`, `release`, `token revoke`, `explain`, `flows`, `events`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from clawker_cp.adminclient.messages import admin, control, to_json
from clawker_cp.cli.ctl.rules import verdict_lines
from clawker_cp.cli.ctl.session import Session, agent_ref, enum_word, moment, seconds_of, table
from clawker_cp.cli.decisions import destination
from clawker_cp.errors import InvalidInput, NotFound

_VERDICTS: dict[str, Any] = {"allowed": 1, "denied": 2, "bypassed": 3, "redirected": 4}
_LAYERS: dict[str, Any] = {"kernel": 1, "dns": 2, "proxy": 3}


@click.command("agents")
@click.option("--all", "everything", is_flag=True, help="Also registered agents that do not run.")
@click.pass_obj
def agents(session: Session, /, *, everything: bool) -> None:
    """
    Show running agents: policy, enforcement, quarantine, bypass, ways out that their owner gave them.
    """
    answer = session.call("ListSessions", control.ListSessionsRequest(all=everything))
    rows = [
        (
            f"{one.project}/{one.agent}",
            one.container_id[:12],
            one.address or "-",
            one.policy,
            "yes" if one.enrolled else "NO",
            one.quarantine_reason or "yes" if one.quarantined else "-",
            moment(one.bypass_until_unix),
            " ".join(one.exposures) or "-",
        )
        for one in answer.sessions
    ]
    head = ("AGENT", "CONTAINER", "ADDRESS", "POLICY", "ENFORCED", "QUARANTINED", "BYPASSED UNTIL", "EXPOSURES")
    session.show(answer, lambda: table(head, rows))


@click.command("bypass")
@click.argument("agent")
@click.option("--for", "duration", default="", help="How long, like 90s or 20m (default: the server's).")
@click.pass_obj
def bypass(session: Session, /, *, agent: str, duration: str) -> None:
    """
    Let AGENT (project/agent, or container) reach everything for a time; the kernel ends it.
    """
    seconds = seconds_of(duration) if duration else 0
    with session.client() as client:
        container = _container(client, agent)
        request = admin.FirewallBypassRequest(container_id=container, timeout_seconds=seconds)
        answer = client.call("FirewallBypass", request)
    session.show(answer, lambda: [f"{agent} passes for {duration or 'the default time'}; it is recorded"])


@click.command("quarantine")
@click.argument("agent")
@click.option("--reason", required=True, help="Why; at most 200 characters.")
@click.pass_obj
def quarantine(session: Session, /, *, agent: str, reason: str) -> None:
    """
    Leave AGENT the control plane only, until released; survives restarts.
    """
    answer = session.call("Quarantine", control.QuarantineRequest(agent=agent_ref(agent), reason=reason))
    session.show(answer, lambda: [f"{agent} is quarantined, {answer.connections_cut} connections cut"])


@click.command("release")
@click.argument("agent")
@click.pass_obj
def release(session: Session, /, *, agent: str) -> None:
    """
    End AGENT's quarantine.
    """
    answer = session.call("Release", control.ReleaseRequest(agent=agent_ref(agent)))
    session.show(answer, lambda: [f"{agent} is released"])


@click.group("token")
def token() -> None:
    """
    Access tokens.
    """


@token.command("revoke")
@click.option("--token", "text", default="", help="This token ('-' reads it from standard input).")
@click.option("--sha256", default="", help="The token with this hex SHA-256.")
@click.option("--client", default="", help="Every token of a client, e.g. clawker-agent.")
@click.option("--all", "everything", is_flag=True, help="Every token.")
@click.pass_obj
def revoke(session: Session, /, *, text: str, sha256: str, client: str, everything: bool) -> None:
    """
    Revoke tokens, at the authority and in every cache.
    """
    if text == "-":
        text = sys.stdin.readline().strip()
    chosen = {"token": text, "token_sha256": sha256, "client_id": client, "all": everything}
    selector: Any = {key: value for key, value in chosen.items() if value}
    if len(selector) != 1:
        raise InvalidInput("--token, --sha256, --client, --all: give one of them")
    answer = session.call("RevokeToken", control.RevokeTokenRequest(**selector))
    session.show(answer, lambda: [f"revoked; {answer.revoked} cached answers dropped"])


@click.command("explain")
@click.argument("event_id")
@click.pass_obj
def explain(session: Session, /, *, event_id: str) -> None:
    """
    Show the decision EVENT_ID, the rule behind it, and what the rules say of it now.
    """
    answer = session.call("Explain", control.ExplainRequest(event_id=event_id))
    session.show(answer, lambda: _explain_lines(answer))


@click.command("flows")
@click.option("--agent", multiple=True, help="Only of this agent; may be repeated.")
@click.option("--verdict", multiple=True, type=click.Choice(sorted(_VERDICTS)))
@click.option("--layer", multiple=True, type=click.Choice(sorted(_LAYERS)))
@click.option("--reason", multiple=True)
@click.option("--host", default="", help="This name and everything below it.")
@click.option("--last", default=50, show_default=True, type=click.IntRange(0, 10_000), help="Replay so many.")
@click.option("--since", default="", help="Replay from so long ago, like 10m.")
@click.option("--follow", "-f", is_flag=True, help="Go on with new ones.")
@click.pass_obj
def flows(session: Session, /, **options: Any) -> None:
    """
    Show decisions, the latest last.
    """
    since = time.time_ns() - seconds_of(options["since"]) * 1_000_000_000 if options["since"] else 0
    request = control.WatchFlowsRequest(
        filter=control.FlowFilter(
            agents=[agent_ref(one) for one in options["agent"]],
            verdicts=[_VERDICTS[one] for one in options["verdict"]],
            layers=[_LAYERS[one] for one in options["layer"]],
            reasons=options["reason"],
            host_suffix=options["host"],
        ),
        follow=options["follow"],
        last=0 if since else options["last"],
        since_unix_ns=since,
    )
    with session.client() as client, client.stream("WatchFlows", request) as items:
        for item in items:
            if item.WhichOneof("item") == "loss":
                loss = item.loss
                session.show_item(loss, f"({loss.count} records of {loss.container_id[:12]} lost at the {loss.where})")
            else:
                session.show_item(item.flow, flow_line(item.flow))


@click.command("events")
@click.option("--topic", multiple=True, help="engine, agent, policy, enforcement, health, auth; all without it.")
@click.pass_obj
def events(session: Session, /, *, topic: tuple[str, ...]) -> None:
    """
    Follow what happens on the control plane.
    """
    request = control.WatchEventsRequest(topics=topic)
    with session.client() as client, client.stream("WatchEvents", request) as items:
        for item in items:
            fields = " ".join(f"{key}={value}" for key, value in sorted(item.fields.items()))
            who = f"{item.project}/{item.agent} " if item.agent else ""
            session.show_item(item, f"{moment(item.time_unix_ns // 10**9)} {item.topic:<11} {item.name} {who}{fields}")


def flow_line(flow: Any) -> str:
    """
    One decision on one line: when, verdict, who, where to, who decided and why, and its id.
    """
    mapping = to_json(flow)
    mapping["port"] = flow.port
    if flow.address:
        mapping["address"] = ".".join(map(str, flow.address)) if len(flow.address) == 4 else flow.address.hex(":", 2)
    when = moment(flow.time_unix_ns // 1_000_000_000)
    who = f"{flow.project}/{flow.agent}"
    decided = f"{enum_word(flow, 'layer')} {flow.reason}"
    return f"{when} {enum_word(flow, 'verdict'):<10} {who:<20} {destination(mapping)}  ({decided})  {flow.event_id}"


def _explain_lines(answer: Any) -> Iterator[str]:
    yield flow_line(answer.flow)
    if answer.HasField("rule"):
        yield f"  decided by {answer.rule.id} {answer.rule.scope}: {answer.rule.egress.action} {answer.rule.egress.dst}"
    if answer.HasField("now"):
        yield "now:"
        yield from verdict_lines(answer.now)


def _container(client: Any, agent: str) -> str:
    """The container id of an agent named by project and agent; AdminService knows containers only."""
    ref = agent_ref(agent)
    if ref.container_id:
        return str(ref.container_id)
    for one in client.call("ListSessions", control.ListSessionsRequest()).sessions:
        if (one.project, one.agent) == (ref.project, ref.agent):
            return str(one.container_id)
    raise NotFound(f"agent {agent} is not running", hint="`clawkerctl agents` lists what runs")
