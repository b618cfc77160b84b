"""
`ebpf-manager`: looking at the pinned kernel state, and the break-glass verbs on it.

The one other writer of the maps besides the control plane (I8), and it says so. Reading needs no
running control plane: everything is in the pins.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from clawker_cp.cli.ebpf_changes import disable, dns_update, enable, flush, gc_dns, sync_routes
from clawker_cp.cli.ebpf_looks import dump_errors, dump_flows, dump_metrics, events, resolve, show, verify_programs
from clawker_cp.cli.groups import ErrorsAsLines
from clawker_cp.ebpf.pins import Pins
from clawker_cp.errors import InvalidInput

MAX_BYPASS_S = 3600


@click.group("ebpf-manager", cls=ErrorsAsLines)
@click.option("--pin-dir", type=click.Path(path_type=Path), default=Path("/sys/fs/bpf/clawker"), show_default=True)
@click.pass_context
def cli(context: click.Context, /, pin_dir: Path) -> None:
    """
    Look at the kernel's state, and change it when the control plane cannot.
    """
    context.obj = Pins(pin_dir)


_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON.")


@cli.command("status")
@_JSON
@click.pass_obj
def status(pins: Pins, /, *, as_json: bool) -> None:
    """
    Generation, switches, links to the agents' parent, cgroups attached by themselves, rows of each map.
    """
    show([pins.status()], as_json=as_json)


@cli.command("dump-containers")
@_JSON
@click.pass_obj
def dump_containers(pins: Pins, /, *, as_json: bool) -> None:
    """
    Every enrolled agent: cgroup id, policy, flags, seconds of bypass left, links of its own; then cgroups
    with links of their own that nobody enrolled.
    """
    show(pins.containers() + pins.not_enrolled(), as_json=as_json)


@cli.command("dump-routes")
@_JSON
@click.pass_obj
def dump_routes(pins: Pins, /, *, as_json: bool) -> None:
    """
    Every route row, of every generation.
    """
    show(pins.routes(), as_json=as_json)


@cli.command("dump-dns")
@_JSON
@click.pass_obj
def dump_dns(pins: Pins, /, *, as_json: bool) -> None:
    """
    Every address an agent was told, and how long it counts.
    """
    show(pins.names(), as_json=as_json)


@cli.command("bypass")
@click.argument("cgroup_id", type=int)
@click.argument("seconds", type=int)
@click.pass_obj
def bypass(pins: Pins, /, *, cgroup_id: int, seconds: int) -> None:
    """
    Let an agent pass for SECONDS; the kernel ends it, whoever lives then. Writes behind the control plane.
    """
    if not 1 <= seconds <= MAX_BYPASS_S:
        raise InvalidInput(f"SECONDS: {seconds} is not 1 to {MAX_BYPASS_S}")
    pins.change(cgroup_id, bypass_until_ns=time.monotonic_ns() + seconds * 1_000_000_000)
    click.echo(f"cgroup {cgroup_id} passes for {seconds} s (written behind the control plane)")


@cli.command("unbypass")
@click.argument("cgroup_id", type=int)
@click.pass_obj
def unbypass(pins: Pins, /, *, cgroup_id: int) -> None:
    """
    End a bypass now. Writes behind the control plane.
    """
    pins.change(cgroup_id, bypass_until_ns=0)
    click.echo(f"cgroup {cgroup_id} is judged by its policy again")


for _verb in (
    dump_metrics, dump_flows, dump_errors, resolve, events, verify_programs, enable, disable, sync_routes, dns_update,
    gc_dns, flush,
):  # fmt: skip
    cli.add_command(_verb)


def main() -> None:
    """
    Entry point of the `ebpf-manager` command.
    """
    if os.geteuid() != 0:
        click.echo("ebpf-manager: needs root: the pins are root's only", err=True)
        sys.exit(1)
    sys.exit(cli())


if __name__ == "__main__":
    main()
