"""`clawker-cp`: the command group."""

from __future__ import annotations

import sys

import click

from clawker_cp.cli.groups import ErrorsAsLines
from clawker_cp.cli.version import version_text

HELP = """
Decide, in the kernel and by name, what AI agents on this host can reach.
"""


@click.group(
    "clawker-cp",
    cls=ErrorsAsLines,
    help=HELP,
    lazy={name: f"clawker_cp.cli.{name}:{name}" for name in ("run", "serve", "check")},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(message=version_text())
def cli() -> None:
    pass


def main() -> None:
    """
    Entry point of the `clawker-cp` command.
    """
    sys.exit(cli())


if __name__ == "__main__":
    main()
