"""
`ebpf-manager`, the verbs that write behind the control plane. Each says so.
"""

from __future__ import annotations

import os
from typing import IO, Any

import click
import orjson

from clawker_cp.ebpf import Manager, breakglass
from clawker_cp.ebpf.pins import Pins
from clawker_cp.engines.host.tables import remove_rings
from clawker_cp.errors import Conflict, InvalidInput
from clawker_cp.runtime.runner import run_main
from clawker_cp.wiring.host_files import server_runs

BEHIND = "(written behind the control plane)"
_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON.")


def say(text: str, *, as_json: bool, **facts: Any) -> None:
    """
    One line for people, or the facts for programs.
    """
    click.echo(orjson.dumps(facts) if as_json else text)


@click.command("enable")
@click.argument("cgroup_id", type=int)
@click.option("--policy", type=int, default=1, show_default=True, help="Policy number; 1 = the global rules.")
@_JSON
@click.pass_obj
def enable(pins: Pins, /, *, cgroup_id: int, policy: int, as_json: bool) -> None:
    """
    Enrol a cgroup, or put an enrolled agent under another policy.
    """
    config = breakglass.enable(pins, cgroup_id, policy)
    text = f"cgroup {cgroup_id} is judged by policy {config.policy} {BEHIND}"
    say(text, as_json=as_json, cgroup_id=cgroup_id, policy=config.policy)


@click.command("disable")
@click.argument("cgroup_id", type=int)
@_JSON
@click.pass_obj
def disable(pins: Pins, /, *, cgroup_id: int, as_json: bool) -> None:
    """
    Take an agent's row away. That opens nothing: what is not enrolled is denied everything.
    """
    breakglass.disable(pins, cgroup_id)
    say(f"cgroup {cgroup_id} is denied everything now {BEHIND}", as_json=as_json, cgroup_id=cgroup_id)


@click.command("sync-routes")
@click.argument("file", type=click.File("rb"))
@_JSON
@click.pass_obj
def sync_routes(pins: Pins, /, *, file: IO[bytes], as_json: bool) -> None:
    """
    Make the kernel's routes equal to FILE ('-' = standard input): a JSON list of
    {policy, identity, port, l4, action, proxy_port}. All of it is checked first.
    """
    try:
        document = orjson.loads(file.read())
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"routes: is not JSON: {error}") from error
    written, removed = breakglass.sync_routes(pins, breakglass.read_routes(document))
    say(f"{written} routes written, {removed} removed {BEHIND}", as_json=as_json, written=written, removed=removed)


@click.command("dns-update")
@click.argument("cgroup_id", type=int)
@click.argument("address")
@click.argument("identity", type=int)
@click.option("--ttl", default=300, show_default=True, help="Seconds it counts.")
@_JSON
@click.pass_obj
def dns_update(pins: Pins, /, *, cgroup_id: int, address: str, identity: int, ttl: int, as_json: bool) -> None:
    """
    Tell the kernel that ADDRESS has the name IDENTITY for an agent, for a time.
    """
    breakglass.update_dns(pins, cgroup_id, address, identity, ttl)
    text = f"cgroup {cgroup_id} knows {address} as {identity} for {ttl} s {BEHIND}"
    say(text, as_json=as_json, cgroup_id=cgroup_id, address=address, identity=identity, ttl_s=ttl)


@click.command("gc-dns")
@_JSON
@click.pass_obj
def gc_dns(pins: Pins, /, *, as_json: bool) -> None:
    """
    Remove learnt addresses whose time is over.
    """
    removed = breakglass.collect_names(pins)
    say(f"{removed} rows removed {BEHIND}", as_json=as_json, removed=removed)


@click.command("flush")
@click.option("--host-pid", type=int, default=0, help="A process of the host's network (default: this one).")
@_JSON
@click.pass_obj
def flush(pins: Pins, /, *, host_pid: int, as_json: bool) -> None:
    """
    Take away what a control plane that died left in the kernel: links, maps, their pins, and the packet filters
    around the agents' bridge. Refused while an agent has processes or a control plane runs on this host; one that
    is a container is ended with `clawkerctl down`, which does this too.
    """
    if server_runs():
        raise Conflict(
            "a control plane runs on this host, and enforces with what this would take away",
            hint="end it: with no agent left it takes all of this away itself",
        )
    pinned = pins.directory.exists()
    Manager(pins.directory).flush()
    tables = run_main(remove_rings(host_pid or os.getpid()))
    left = [str(pins.directory)] * pinned + [f"table {name}" for name in tables]
    say(f"removed: {', '.join(left) or 'nothing, there was nothing'}", as_json=as_json, removed=left)
