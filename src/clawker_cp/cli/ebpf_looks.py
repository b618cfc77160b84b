"""
`ebpf-manager`, the verbs that look: counters, states, one cgroup, records as they come, the verifier's costs.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import click
import orjson

from clawker_cp import accel
from clawker_cp.ebpf.config import unmapped
from clawker_cp.ebpf.pins import VERDICTS, Pins
from clawker_cp.ebpf.verifier import problems, verify
from clawker_cp.engines.host.cgroups import find_cgroup2
from clawker_cp.errors import Conflict
from clawker_cp.telemetry.enrich import REASONS
from clawker_cp.wiring.host_files import server_runs

POLL_S = 0.01
BATCH = 256
_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON.")


def show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """
    Print rows as JSON, or as lines of `key=value`.
    """
    if as_json:
        click.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
        return
    for row in rows:
        click.echo("  ".join(f"{key}={value}" for key, value in row.items()))


@click.command("dump-metrics")
@_JSON
@click.pass_obj
def dump_metrics(pins: Pins, /, *, as_json: bool) -> None:
    """
    Exact decisions by agent, name identity, port and outcome; the largest first.
    """
    rows = [{**row, "reason": REASONS.get(row["reason"], str(row["reason"]))} for row in pins.metrics()]
    show(rows, as_json=as_json)


@click.command("dump-flows")
@_JSON
@click.pass_obj
def dump_flows(pins: Pins, /, *, as_json: bool) -> None:
    """
    Records given and suppressed by agent, and who may connect to which published port.
    """
    show(pins.flows(), as_json=as_json)


@click.command("dump-errors")
@_JSON
@click.pass_obj
def dump_errors(pins: Pins, /, *, as_json: bool) -> None:
    """
    Failures of kernel helpers, by site and errno; nothing is the good answer.
    """
    show([{"where": where, "count": count} for where, count in pins.errors().items()], as_json=as_json)


@click.command("resolve")
@click.argument("reference")
@_JSON
@click.pass_obj
def resolve(pins: Pins, /, *, reference: str, as_json: bool) -> None:
    """
    What a cgroup id, or a path below the cgroup2 mount, is to the programs.
    """
    show([pins.resolve(reference, find_cgroup2())], as_json=as_json)


@click.command("events")
@click.option("--seconds", type=click.FloatRange(0.0, 86400.0), default=0.0, help="Stop after so long (0: never).")
@_JSON
@click.pass_obj
def events(pins: Pins, /, *, seconds: float, as_json: bool) -> None:
    """
    Show decisions as the kernel records them. Only while no control plane runs: a record is read once.
    """
    if server_runs():
        raise Conflict(
            "a control plane runs and reads the records; a second reader would take them from it",
            hint="`clawkerctl flows --follow` shows them",
        )
    until = time.monotonic() + seconds if seconds else float("inf")
    with pins.ring() as take, suppress(KeyboardInterrupt):
        while True:
            records = take(BATCH)
            for record in records:
                _show_record(record, as_json=as_json)
            if time.monotonic() >= until:
                return
            if not records:
                time.sleep(POLL_S)


@click.command("verify")
@_JSON
@click.pass_context
def verify_programs(context: click.Context, /, *, as_json: bool) -> None:
    """
    Load every program into this kernel, attach none, and compare instructions and stack with the budget.

    Exits 1 when a program is over its budget.
    """
    costs, budget = verify()
    rows = [
        {
            "program": name,
            "instructions": cost["instructions"],
            "instructions_budget": budget.get(name, {}).get("instructions"),
            "stack": cost["stack"],
            "stack_budget": budget.get(name, {}).get("stack"),
        }
        for name, cost in costs.items()
    ]
    show(rows, as_json=as_json)
    found = problems(costs, budget)
    for problem in found:
        click.echo(problem, err=True)
    context.exit(1 if found else 0)


def _show_record(record: accel.KernelEvent, *, as_json: bool) -> None:
    fields: dict[str, Any] = {
        "ktime_ns": record.ktime_ns,
        "cgroup_id": record.cgroup_id,
        "sequence": record.sequence,
        "verdict": VERDICTS.get(record.verdict, str(record.verdict)),
        "reason": REASONS.get(record.reason, str(record.reason)),
        "address": unmapped(record.addr),
        "port": record.port,
        "proxy_port": record.proxy_port,
        "policy": record.policy,
        "uid": record.uid,
        "pid": record.pid,
    }
    click.echo(orjson.dumps(fields) if as_json else "  ".join(f"{key}={value}" for key, value in fields.items()))
