"""
`clawkerctl status`: what runs, and how it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from clawker_cp.adminclient.messages import control
from clawker_cp.cli.ctl.session import Session, enum_word, moment, table


@click.command("status")
@click.pass_obj
def status(session: Session, /) -> None:
    """
    Show the control plane's version, policy, agents, components and host.

    Exits 1 when a critical component has failed.
    """
    answer = session.call("GetStatus", control.GetStatusRequest())
    session.show(answer, lambda: _lines(answer))
    if any(one.critical and one.health == control.HEALTH_FAILED for one in answer.components):
        raise click.exceptions.Exit(1)


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
