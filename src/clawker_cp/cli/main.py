"""
`clawker-cp`: the command group, how errors read, and what `--version` tells.

One line on standard error per failure and a hint below it; exit codes 0 fine, 1 failed, 2 usage,
3 host not supported (house style), 125 for failures of `run` that are ours (ruling R40).
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from typing import Any

import click

from clawker_cp import accel
from clawker_cp.cli.check import check
from clawker_cp.cli.run import OWN_FAILURE, run
from clawker_cp.cli.serve import serve
from clawker_cp.errors import ClawkerError, InvalidInput, Unsupported

HELP = """
Decide, in the kernel and by name, what AI agents on this host can reach.
"""

NOT_SUPPORTED = 3


def version_text() -> str:
    """
    Versions of everything that decides: ours, Python, libbpf, the kernel, and which hot paths run.
    """
    return (
        f"clawker-cp {version('clawker-cp')}\n"
        f"Python {platform.python_version()}, kernel {platform.release()}, "
        f"libbpf {accel.libbpf_version()}, hot paths: {accel.IMPLEMENTATION}"
    )


class ErrorsAsLines(click.Group):
    """A group whose commands may raise `ClawkerError`; it becomes one line, a hint and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.show()
            ctx.exit(OWN_FAILURE if ctx.invoked_subcommand == "run" else error.exit_code)
        except ClawkerError as error:
            click.echo(f"clawker-cp: {error.message}", err=True)
            if error.hint:
                click.echo(f"  hint: {error.hint}", err=True)
            ctx.exit(exit_code(error, ctx.invoked_subcommand))


def exit_code(error: ClawkerError, command: str | None) -> int:
    """
    The exit code of a failure: those of `run` are 125, all others belong to the command it runs.
    """
    if command == "run":
        return OWN_FAILURE
    if isinstance(error, Unsupported):
        return NOT_SUPPORTED
    return 2 if isinstance(error, InvalidInput) else 1


@click.group("clawker-cp", cls=ErrorsAsLines, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(message=version_text())
def cli() -> None:
    pass


cli.add_command(run)
cli.add_command(serve)
cli.add_command(check)


def main() -> None:
    """
    Entry point of the `clawker-cp` command.
    """
    sys.exit(cli())


if __name__ == "__main__":
    main()
