"""
What is said at the end of a run: what was allowed and denied, and how to allow what was denied.

Also the learned rules of a `--learn` run. Pure, over the flow records of one agent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from clawker_cp.telemetry.enrich import is_address
from clawker_cp.telemetry.flows import ALLOWED, BYPASSED, DENIED, DNS, KERNEL, PROXY, REDIRECTED, Flow

DIRECT_REASONS = frozenset({"address_rule", "bypass", "learn"})
SHOWN = 20


@dataclass(frozen=True, slots=True, order=True)
class Destination:
    """What a rule would have to name."""

    host: str
    proto: str
    port: int
    path: str = ""
    method: str = ""


class Summary:
    """
    Counts outcomes of one agent as records come; bounded by `limit` destinations.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self.allowed: Counter[Destination] = Counter()
        self.denied: Counter[Destination] = Counter()
        self._reasons: dict[Destination, str] = {}

    def add(self, flows: Iterable[Flow]) -> None:
        """
        Count what is an outcome: every refusal, and what really went out.
        """
        for flow in flows:
            target = destination(flow)
            if flow.verdict == DENIED:
                self._count(self.denied, target)
                self._reasons.setdefault(target, flow.reason)
            elif (flow.layer == PROXY and not flow.status) or (flow.layer == KERNEL and flow.reason in DIRECT_REASONS):
                self._count(self.allowed, Destination(target.host, target.proto, target.port))

    def _count(self, counter: Counter[Destination], target: Destination) -> None:
        if target in counter or len(counter) < self._limit:
            counter[target] += 1

    def lines(self, allow: Callable[[Destination], str]) -> list[str]:
        """
        The summary as lines; `allow` gives the command that would allow a destination, or "".
        """
        lines = [f"{sum(self.allowed.values())} allowed, {sum(self.denied.values())} denied"]
        lines += [f"  allowed {count:>5} x  {_text(t)}" for t, count in self.allowed.most_common(SHOWN)]
        for target, count in self.denied.most_common(SHOWN):
            lines.append(f"  denied  {count:>5} x  {_text(target)}  ({self._reasons[target]})")
            command = allow(target)
            if command:
                lines.append(f"{'':17}allow it with: {command}")
        return lines


def destination(flow: Flow) -> Destination:
    """
    What a record's rule would name; a refused question names no port, https is what was meant.
    """
    if flow.layer == DNS:
        return Destination(flow.host, "https" if flow.verdict == DENIED else "dns", 443)
    path = flow.path if flow.reason == "path_denied" else ""
    return Destination(
        flow.host or flow.address, flow.proto, flow.port, path, flow.method if path and flow.method != "GET" else ""
    )


def learned(flows: Iterable[Flow]) -> list[Destination]:
    """
    The least that would have sufficed for what a learning run reached, sorted.

    A name with a port is one rule; a flow to an address that was never resolved names the address.
    """
    found: set[Destination] = set()
    for flow in flows:
        if flow.layer == PROXY and flow.verdict in {ALLOWED, REDIRECTED} and flow.host and flow.port:
            found.add(Destination(flow.host, flow.proto, flow.port))
        elif flow.layer == KERNEL and flow.reason in {"learn"} and flow.verdict in {ALLOWED, BYPASSED}:
            proto = "ssh" if flow.proto == "tcp" and flow.port == 22 else flow.proto
            found.add(Destination(flow.host or flow.address, proto, flow.port))
    return sorted(found, key=lambda d: (is_address(d.host), d.host, d.port, d.proto))


def _text(target: Destination) -> str:
    if not target.host:
        return target.proto or "socket"
    host = f"[{target.host}]" if ":" in target.host else target.host
    method = f"{target.method} " if target.method else ""
    return f"{method}{target.proto}://{host}" + (f":{target.port}" if target.port else "") + target.path
