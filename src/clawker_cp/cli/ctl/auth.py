"""
`clawkerctl auth init|rotate|status`: the auth tree on this host. Needs no running control plane.
"""

from __future__ import annotations

from pathlib import Path

import click
import orjson

from clawker_cp.cli.ctl.session import Session, table
from clawker_cp.pki.tree import AuthTree

_STOPS = (
    "--force makes a new CA, signing key and JWK. What stops working until it is told:\n"
    "  the running control plane and its clients (restart it), every agent container (recreate it),\n"
    "  the telemetry collector's trust."
)


@click.group("auth")
def auth() -> None:
    """
    Certificates and keys of this host.
    """


@auth.command("init")
@click.pass_obj
def init(session: Session, /) -> None:
    """
    Make what is missing and verify the rest; never makes a new CA by itself.
    """
    AuthTree(session.auth).ensure()
    _show(session)


@auth.command("rotate")
@click.option("--force", is_flag=True, help="A new CA too; prints what stops working and asks.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def rotate(session: Session, /, *, force: bool, yes: bool) -> None:
    """
    Mint every leaf anew under the same CA.
    """
    if force:
        click.echo(_STOPS, err=True)
        if not yes:
            click.confirm("Go on?", abort=True, err=True)
    AuthTree(session.auth).rotate(force=force)
    _show(session)


@auth.command("status")
@click.pass_obj
def status(session: Session, /) -> None:
    """
    Show every certificate, its end, and what is wrong with it. Exits 1 if anything is.
    """
    if _show(session):
        raise click.exceptions.Exit(1)


def _show(session: Session) -> bool:
    """Print the tree; whether anything is wrong with it."""
    root: Path = session.auth
    findings = AuthTree(root).findings()
    if session.as_json:
        rows = [
            {"path": str(one.path), "subject": one.subject, "not_after": one.not_after and one.not_after.isoformat(),
             "problem": one.problem, "fix": one.fix}
            for one in findings
        ]  # fmt: skip
        click.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
    else:
        lines = table(
            ("FILE", "SUBJECT", "ENDS", "PROBLEM"),
            [
                (
                    one.path.relative_to(root),
                    one.subject,
                    f"{one.not_after:%Y-%m-%d}" if one.not_after else "-",
                    one.problem or "-",
                )
                for one in findings
            ],
        )
        for line in lines:
            click.echo(line)
        for fix in dict.fromkeys(one.fix for one in findings if one.fix):
            click.echo(f"  hint: {fix}", err=True)
    if not findings:
        click.echo(f"there is nothing at {root}; `clawkerctl auth init` makes it", err=True)
        return True
    return any(one.problem for one in findings)
