"""
What is said at the end of a run: what was allowed and denied, and how to allow what was denied.

Pure, over the flow records of one agent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from clawker_cp.telemetry.flows import DENIED, DNS, KERNEL, PROXY, Flow, printable
from clawker_cp.telemetry.learn import Destination, learned

DIRECT_REASONS = frozenset({"address_rule", "bypass", "learn"})
# Refusals that a rule would change; the others are no matter of rules, or of a deny rule that is meant.
CURABLE = frozenset({"not_allowed", "no_route", "host_not_allowed", "path_denied", "route_expired"})
SHOWN = 20

__all__ = ["Destination", "Summary", "destination", "learned"]


class Summary:
    """
    Counts outcomes of one agent as records come; bounded by `limit` destinations of each kind.

    A resolver that asks for A, AAAA and HTTPS of a refused name asked once.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self.allowed: Counter[Destination] = Counter()
        self.denied: Counter[Destination] = Counter()
        self._reasons: dict[Destination, str] = {}
        self._questions: dict[Destination, Counter[str]] = {}

    def add(self, flows: Iterable[Flow]) -> None:
        """
        Count what is an outcome: every refusal, and what really went out.
        """
        # What many flows have in common is looked at once: an agent in a loop sends thousands of equal ones.
        many: dict[tuple[str, str, int, str, str, str, str, str], tuple[Flow, int]] = {}
        for flow in flows:
            denied, layer = flow.verdict == DENIED, flow.layer
            if layer == DNS:
                if denied and self._asked_anew(destination(flow), flow.query_type):
                    self._deny(flow, 1)
            elif denied or (layer == PROXY and not flow.status) or (layer == KERNEL and flow.reason in DIRECT_REASONS):
                key = (
                    flow.host, flow.address, flow.port, flow.verdict, flow.reason, flow.proto, flow.path, flow.method
                )  # fmt: skip
                first, count = many.get(key, (flow, 0))
                many[key] = (first, count + 1)
        for flow, count in many.values():
            if flow.verdict == DENIED:
                self._deny(flow, count)
            else:
                target = destination(flow)
                self._count(self.allowed, Destination(target.host, target.proto, target.port), count)

    def _deny(self, flow: Flow, count: int) -> None:
        target = destination(flow)
        if self._count(self.denied, target, count):
            self._reasons.setdefault(target, flow.reason)

    def _asked_anew(self, target: Destination, query_type: str) -> bool:
        asked = self._questions.get(target)
        if asked is None:
            if len(self._questions) >= self._limit:
                return True
            asked = self._questions[target] = Counter()
        most = max(asked.values(), default=0)
        asked[query_type] += 1
        return asked[query_type] > most

    def _count(self, counter: Counter[Destination], target: Destination, count: int) -> bool:
        if target not in counter and len(counter) >= self._limit:
            return False
        counter[target] += count
        return True

    def lines(self, allow: Callable[[Destination], str]) -> list[str]:
        """
        The summary as lines; `allow` gives the command that would allow a destination, or "".
        """
        lines = [f"{sum(self.allowed.values())} allowed, {sum(self.denied.values())} denied"]
        lines += [f"  allowed {count:>5} x  {_text(t)}" for t, count in self.allowed.most_common(SHOWN)]
        for target, count in self.denied.most_common(SHOWN):
            reason = self._reasons[target]
            lines.append(f"  denied  {count:>5} x  {_text(target)}  ({reason})")
            command = allow(target) if reason in CURABLE else ""
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


def _text(target: Destination) -> str:
    if not target.host:
        return target.proto or "socket"
    host = f"[{target.host}]" if ":" in target.host else target.host
    method = f"{target.method} " if target.method else ""
    port = f":{target.port}" if target.port else ""
    return printable(f"{method}{target.proto}://{host}{port}{target.path}")
