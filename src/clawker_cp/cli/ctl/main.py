"""
`clawkerctl`: the command group, where the control plane is, and how failures read.

Exit codes: 0 fine, 1 refused, failed or "no" (`check`, `auth status`), 2 usage, 125 and a command's own for
`sandbox run|attach`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click
import structlog

from clawker_cp.cli.ctl.session import Session
from clawker_cp.cli.groups import LazyGroup, show_failure
from clawker_cp.cli.version import version_text
from clawker_cp.config import Directories, environment, load_settings
from clawker_cp.errors import ClawkerError, InvalidInput

HELP = """
Command the control plane of this host.

\b
clawkerctl status
clawkerctl allow https://api.example.com
clawkerctl check https://api.example.com --agent shop/dev
clawkerctl flows --verdict denied --follow

Shell completion: eval "$(_CLAWKERCTL_COMPLETE=bash_source clawkerctl)", likewise zsh_source and fish_source.
"""


VERBS = {
    "agents": "agents bypass events explain flows quarantine release token",
    "auth": "auth",
    "firewall": "firewall",
    "lifecycle": "down up",
    "rules": "allow check deny rules",
    "sandboxes": "sandbox",
    "status": "status",
}
LAZY = {verb: f"clawker_cp.cli.ctl.{module}:{verb}" for module, verbs in VERBS.items() for verb in verbs.split()}


class Failures(LazyGroup):
    """A group whose verbs may raise `ClawkerError`: one line on standard error, a hint below it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ClawkerError as error:
            show_failure("clawkerctl", error)
            ctx.exit(2 if isinstance(error, InvalidInput) else 1)


@click.group(
    "clawkerctl",
    cls=Failures,
    help=HELP,
    lazy={**LAZY, "why": LAZY["explain"]},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--auth-dir", type=click.Path(path_type=Path), help="Auth tree (default: <data>/auth).")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where the control plane listens.")
@click.option("--admin-port", type=click.IntRange(1, 65535), help="Default: settings.yaml, else 7443.")
@click.option("--token-port", type=click.IntRange(1, 65535), help="Default: settings.yaml, else 4444.")
@click.option("--json", "as_json", is_flag=True, help="Answers as JSON, one document or one line an item.")
@click.version_option(message=version_text())
@click.pass_context
def cli(
    context: click.Context,
    /,
    *,
    auth_dir: Path | None,
    host: str,
    admin_port: int | None,
    token_port: int | None,
    as_json: bool,
) -> None:
    # What is said while working is no part of the answer, and answers are read by programs.
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )
    directories = Directories.from_environment(environment())
    ports = load_settings(directories, environment()).cli.control_plane
    context.obj = Session(
        auth=auth_dir or directories.data / "auth",
        host=host,
        admin_port=admin_port or ports.admin_port,
        token_port=token_port or ports.hydra_public_port,
        as_json=as_json,
    )


def main() -> None:
    """
    Entry point of the `clawkerctl` command.
    """
    sys.exit(cli())


if __name__ == "__main__":
    main()
