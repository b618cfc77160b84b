"""
How a decision reads on a terminal, and which ones are worth a line while a command runs.

Pure functions and one small filter over flow records in their JSON form (contract 2.4, `Flow`).
Called by `cli.run`.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Any

import click

from clawker_cp.telemetry.flows import printable

# The proxy's record says who was really reached; the kernel's and the gate's "yes" before it only
# repeat it. Address rules, learning and bypass have no proxy: there the kernel's is the only one.
_KERNEL_ALLOWED_SHOWN = frozenset({"address_rule", "bypass", "learn"})

_COLOURS = {"FLOW_VERDICT_DENIED": "red", "FLOW_VERDICT_BYPASSED": "yellow"}


def is_denied(flow: dict[str, Any]) -> bool:
    """
    Whether the record is a refusal.
    """
    return bool(flow.get("verdict") == "FLOW_VERDICT_DENIED")


def is_outcome(flow: dict[str, Any]) -> bool:
    """
    Whether the record is the last word on an attempt: every refusal, and what really went out.
    """
    if is_denied(flow):
        return True
    if flow.get("layer") == "LAYER_PROXY":
        return True
    return flow.get("layer") == "LAYER_KERNEL" and flow.get("reason") in _KERNEL_ALLOWED_SHOWN


def destination(flow: dict[str, Any]) -> str:
    """
    Name (or address) and port of a record, as `proto://host[:port][/path]`.
    """
    host = flow.get("host") or flow.get("address") or "?"
    port = flow.get("port", 0)
    proto = flow.get("proto") or "other"
    if proto == "dns":
        return printable(f"{host} ({flow.get('query_type', 'A')})")
    if host != "?" and _is_ipv6(host):
        host = f"[{host}]"
    text = f"{proto}://{host}"
    if port:
        text += f":{port}"
    if flow.get("path"):
        text = f"{flow.get('method', 'GET')} {text}{flow['path']}"
    return printable(text)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def decision_line(flow: dict[str, Any], *, colour: bool) -> str:
    """
    One line for people: verdict, destination, who decided and why.
    """
    verdict = str(flow.get("verdict", "")).removeprefix("FLOW_VERDICT_").lower()
    word = {"redirected": "allowed"}.get(verdict, verdict)
    layer = str(flow.get("layer", "")).removeprefix("LAYER_").lower()
    why = flow.get("reason", "")
    rule = f", rule {flow['rule_id']}" if flow.get("rule_id") else ""
    text = f"{word:<8} {destination(flow)}  [{layer}: {why}{rule}]"
    if colour:
        text = click.style(text, fg=_COLOURS.get(str(flow.get("verdict")), "green"))
    return f"clawker-cp: {text}"


class FirstOfEachKind:
    """
    Lets the first record of a kind through and counts the others.

    A kind is verdict, destination and reason, so a retry loop prints once; the summary has the
    numbers. Holds at most `limit` kinds, later new ones all pass.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._limit = limit

    def passes(self, flow: dict[str, Any]) -> bool:
        """
        Whether this record is the first of its kind.
        """
        kind = (flow.get("verdict"), destination(flow), flow.get("reason"))
        if kind not in self._seen and len(self._seen) >= self._limit:
            return True
        self._seen[kind] += 1
        return self._seen[kind] == 1
