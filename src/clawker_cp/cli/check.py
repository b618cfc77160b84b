"""
`clawker-cp check`: what this host has of what enforcement needs, as a table.

Prints what is there, what is missing and what that costs; changes nothing. The rows come from
`wiring.host_table`.
"""

from __future__ import annotations

import click
import orjson

from clawker_cp.errors import Unsupported
from clawker_cp.wiring.host_table import preflight
from clawker_cp.wiring.translation import load_configuration


@click.command("check")
@click.option("--json", "as_json", is_flag=True, help="The rows as a JSON array.")
def check(*, as_json: bool) -> None:
    """
    Show what this host offers, what is missing, and what that costs.

    Exits 3 when something enforcement cannot do without is missing.
    """
    settings, _directories = load_configuration()
    rows = preflight(settings)
    if as_json:
        click.echo(orjson.dumps([row.as_mapping() for row in rows], option=orjson.OPT_INDENT_2))
    else:
        width = max(len(row.name) for row in rows)
        for row in rows:
            mark = "yes" if row.present else ("NO" if row.required else "no")
            click.echo(f"{row.name:<{width}}  {mark:<3}  {row.detail}")
            if not row.present:
                click.echo(f"{'':<{width}}       need: {row.need}; without it: {row.cost}")
    missing = [row.name for row in rows if row.required and not row.present]
    if missing:
        raise Unsupported(
            f"this host cannot enforce: {', '.join(missing)} missing",
            feature=missing[0],
            hint="the rows marked NO above say what to install or change",
        )
    if not as_json:
        click.echo("this host can enforce")
