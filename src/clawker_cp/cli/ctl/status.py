"""
`clawkerctl status`: what runs, and how it is.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from typing import Any

import click
import orjson

from clawker_cp.adminclient.messages import control, to_json
from clawker_cp.cli.ctl.lifecycle import container_state
from clawker_cp.cli.ctl.session import Session, enum_word, moment, table
from clawker_cp.errors import ClawkerError, Unavailable

CONNECT_LIMIT_S = 2.0


@click.command("status")
@click.pass_obj
def status(session: Session, /) -> None:
    """
    Show the control plane's version, policy, agents, components and host, and its container if it is one.

    Exits 1 when a critical component has failed.
    """
    container = container_state()
    try:
        if container is not None and container["status"] != "running":
            _refuse_silence(session)
        answer = session.call("GetStatus", control.GetStatusRequest())
    except ClawkerError as error:
        if container is not None:
            error.hint = f"{container_line(container)}; `clawkerctl up` starts it"
        raise
    if session.as_json:
        document = to_json(answer) if container is None else {**to_json(answer), "container": container}
        click.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    else:
        for line in _lines(answer):
            click.echo(line)
        if container is not None:
            click.echo(f"\n{container_line(container)}")
    if any(one.critical and one.health == control.HEALTH_FAILED for one in answer.components):
        raise click.exceptions.Exit(1)


def _refuse_silence(session: Session) -> None:
    """
    Raise `Unavailable` when nothing listens: with a container that does not run there is nobody to wait for.
    """
    try:
        socket.create_connection((session.host, session.admin_port), CONNECT_LIMIT_S).close()
    except OSError as error:
        raise Unavailable(f"no control plane answers at {session.host}:{session.admin_port}") from error


def container_line(container: Mapping[str, Any]) -> str:
    """
    One line about the container; why it does not run, if it does not.
    """
    health = f", {container['health']}" if container["status"] == "running" and container["health"] else ""
    ended = "" if container["status"] == "running" else f" with exit code {container['exit_code']}"
    restarts = f", restarted {container['restarts']} times" if container["restarts"] else ""
    said = f": {container['last_word']}" if container.get("last_word") else ""
    line = f"container {container['name']} {container['id'][:12]} of {container['image']}"
    return f"{line}: {container['status']}{ended}{health}{restarts}{said}"


def _lines(answer: Any) -> Iterator[str]:
    ready = "ready" if answer.ready else "starting"
    yield f"clawker-cp {answer.version}, {ready} since {moment(answer.started_at_unix)}"
    yield f"engine {answer.engine}, stack {answer.stack}"
    yield f"policy version {answer.policy_version}: {answer.rules} rules, {answer.policies} policies"
    yield (
        f"agents: {answer.agents_enrolled} enrolled, {answer.agents_quarantined} quarantined, "
        f"{answer.agents_bypassed} bypassed"
    )
    yield ""
    rows = [
        (one.name, one.implementation or "-", enum_word(one, "health"), moment(one.since_unix), one.detail or "-")
        for one in answer.components
    ]
    yield from table(("COMPONENT", "IMPLEMENTATION", "HEALTH", "SINCE", "DETAIL"), rows)
    missing = [one for one in answer.host if not one.present]
    if missing:
        yield ""
        yield from table(("MISSING HERE", "NEEDS", "WITHOUT IT"), [(one.name, one.need, one.cost) for one in missing])
