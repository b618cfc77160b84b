"""
`clawkerctl firewall ...`: AdminService, one verb each.
"""

from __future__ import annotations

import click

from clawker_cp.adminclient.messages import admin
from clawker_cp.cli.ctl.session import Session, seconds_of, table
from clawker_cp.errors import InvalidInput

_ADDED = {1: "added", 2: "modified", 3: "unchanged"}
_REMOVED = {1: "removed", 2: "path removed", 3: "not found"}


@click.group("firewall")
def firewall() -> None:
    """
    The firewall as the released CLI commands it: on and off, global rules, one agent's enforcement.
    """


@firewall.command("up")
@click.pass_obj
def up(session: Session, /) -> None:
    """
    Turn the firewall on: programs attached, Envoy and DNS running, every agent enrolled.
    """
    answer = session.call("FirewallInit", admin.FirewallInitRequest())
    session.show(answer, lambda: [f"on: proxy {answer.envoy_ip}, dns {answer.coredns_ip}, {answer.network_id}"])


@firewall.command("down")
@click.pass_obj
def down(session: Session, /) -> None:
    """
    Turn the firewall off. Refused while any agent runs; rules and certificates stay.
    """
    answer = session.call("FirewallRemove", admin.FirewallRemoveRequest())
    session.show(answer, lambda: ["off"])


@firewall.command("enable")
@click.argument("container")
@click.pass_obj
def enable(session: Session, /, *, container: str) -> None:
    """
    Make sure CONTAINER (id, prefix of 12 or more characters, or name) is enforced; ends a bypass.
    """
    answer = session.call("FirewallEnable", admin.FirewallEnableRequest(container_id=container))
    session.show(answer, lambda: [f"{container} is enforced"])


@firewall.command("disable")
@click.argument("container")
@click.pass_obj
def disable(session: Session, /, *, container: str) -> None:
    """
    Never opens a running container: it says so. For a limited time use `bypass`.
    """
    answer = session.call("FirewallDisable", admin.FirewallDisableRequest(container_id=container))
    session.show(answer, lambda: [f"{container} is not running, there is nothing to end"])


@firewall.command("bypass")
@click.argument("container")
@click.option("--for", "duration", default="", help="How long, like 90s or 20m (default: the server's).")
@click.pass_obj
def bypass(session: Session, /, *, container: str, duration: str) -> None:
    """
    Let CONTAINER reach everything for a time; the kernel ends it.
    """
    seconds = seconds_of(duration) if duration else 0
    request = admin.FirewallBypassRequest(container_id=container, timeout_seconds=seconds)
    answer = session.call("FirewallBypass", request)
    session.show(answer, lambda: [f"{container} passes for {duration or 'the default time'}; it is recorded"])


@firewall.command("add")
@click.argument("dst")
@click.option("--proto", default="", help="https (default), http, ws, wss, tcp, ssh or udp.")
@click.option("--port", default="", help="A port, or a range like 9000-9100.")
@click.option("--deny", is_flag=True, help="Deny instead of allow.")
@click.pass_obj
def add(session: Session, /, *, dst: str, proto: str, port: str, deny: bool) -> None:
    """
    Add one global rule for DST: a name, .name (and all below it), an address or a CIDR.
    """
    rule = admin.EgressRule(dst=dst, proto=proto, port=port, action="deny" if deny else "allow")
    answer = session.call("FirewallAddRules", admin.FirewallAddRulesRequest(rules=[rule]))
    session.show(answer, lambda: [_said(_ADDED.get(answer.statuses[0], "?"), live=answer.stack_restarted)])


@firewall.command("remove")
@click.argument("dst", default="")
@click.option("--proto", default="")
@click.option("--port", default="")
@click.option("--path", default="", help="Only this path entry of the rule.")
@click.option("--all", "everything", is_flag=True, help="Every global rule; also repairs unreadable files.")
@click.pass_obj
def remove(session: Session, /, *, dst: str, proto: str, port: str, path: str, everything: bool) -> None:
    """
    Remove one global rule, one path of it, or all of them.
    """
    if everything == bool(dst):
        raise InvalidInput("DST, --all: give one of both")
    request = admin.FirewallRemoveRuleRequest(dst=dst, proto=proto, port=port, path=path, all=everything)
    answer = session.call("FirewallRemoveRule", request)
    session.show(answer, lambda: [_said(_REMOVED.get(answer.status, "?"), live=answer.stack_restarted)])


@firewall.command("list")
@click.pass_obj
def list_rules(session: Session, /) -> None:
    """
    Show the stored global rules, as entered.
    """
    answer = session.call("FirewallListRules", admin.FirewallListRulesRequest())
    rows = [
        (one.action, one.dst, one.proto, one.port or "-", len(one.path_rules) or "-", one.path_default or "-")
        for one in answer.rules
    ]
    session.show(answer, lambda: table(("ACTION", "DST", "PROTO", "PORT", "PATHS", "DEFAULT"), rows))


@firewall.command("status")
@click.pass_obj
def status(session: Session, /) -> None:
    """
    Show whether proxy and DNS are up, as probed just now.
    """
    answer = session.call("FirewallStatus", admin.FirewallStatusRequest())
    yes = {True: "healthy", False: "not healthy"}
    session.show(
        answer,
        lambda: [
            f"firewall {'on' if answer.running else 'off'}, {answer.rule_count} global rules",
            f"proxy {answer.envoy_ip}: {yes[answer.envoy_health]}",
            f"dns {answer.coredns_ip}: {yes[answer.coredns_health]}",
            f"network {answer.network_id} {answer.cidr}",
        ],
    )


@firewall.command("reload")
@click.pass_obj
def reload(session: Session, /) -> None:
    """
    Read the rules files and certificates again; a bad file changes nothing.
    """
    answer = session.call("FirewallReload", admin.FirewallReloadRequest())
    session.show(answer, lambda: [_said("read", live=answer.stack_restarted)])


@firewall.command("rotate-ca")
@click.pass_obj
def rotate_ca(session: Session, /) -> None:
    """
    Make a new inspection CA, cross-signed by the present one; running agents keep working.
    """
    answer = session.call("FirewallRotateCA", admin.FirewallRotateCARequest())
    session.show(answer, lambda: [_said("rotated", live=answer.stack_restarted)])


@firewall.command("sync-routes")
@click.pass_obj
def sync_routes(session: Session, /) -> None:
    """
    Write the kernel's tables again from the compiled policy.
    """
    answer = session.call("FirewallSyncRoutes", admin.FirewallSyncRoutesRequest())
    session.show(answer, lambda: [f"{answer.applied} routes"])


@firewall.command("resolve")
@click.argument("hostname")
@click.pass_obj
def resolve(session: Session, /, *, hostname: str) -> None:
    """
    Resolve HOSTNAME as the control plane's host does, not as agents do.
    """
    answer = session.call("FirewallResolveHostname", admin.FirewallResolveHostnameRequest(hostname=hostname))
    session.show(answer, lambda: list(answer.addresses))


def _said(what: str, *, live: bool) -> str:
    return f"{what}; {'enforced now' if live else 'nothing to enforce, or the stack is not running'}"
