"""
The numbers of this process in Prometheus text form, with the names of the contract.

Counted where things happen, on the loop; gauges of state are asked for when somebody scrapes. HTTP is served
elsewhere. No label ever holds a name an agent chose, an address or a token: label values come from the fixed
sets below, anything else counts as `other`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from clawker_cp.runtime.clock import SYSTEM_CLOCK, Clock
from clawker_cp.runtime.health import Component, Health
from clawker_cp.telemetry.enrich import REASONS
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import ALLOWED, BYPASSED, DENIED, DNS, KERNEL, PROXY, REDIRECTED, Flow

PREFIX = "clawker_cp"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LAG_EVERY_S = 0.5
CUT_CAUSES = frozenset({"rule", "bypass", "quarantine", "enroll"})
AGENT_STATES = ("enrolled", "quarantined", "bypassed", "connected", "untrusted")
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
FAST_SECONDS = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.1, 1.0)

_LAYERS = {KERNEL: "kernel", DNS: "dns", PROXY: "proxy"}
_VERDICTS = {ALLOWED: "allowed", DENIED: "denied", BYPASSED: "bypassed", REDIRECTED: "redirected"}
# fmt: off
_GATE_REASONS = frozenset({
    "not_allowed", "rule_deny", "reserved", "type", "budget", "address_refused", "forwarder_failed", "map_write_failed",
    "proxy_not_ready", "malformed", "answered", "bypassed", "quarantined", "unknown_client",
})
_PROXY_REASONS = frozenset({
    "host_not_allowed", "rule_deny", "path_denied", "path_not_canonical", "sni_mismatch", "request_refused",
    "origin_error", "forwarded",
})
# fmt: on
_REASONS = frozenset(REASONS.values()) | _GATE_REASONS | _PROXY_REASONS
_HEALTH = {Health.FAILED: 0, Health.DEGRADED: 1, Health.OK: 2}


class Metrics:
    """
    One per server, with a registry of its own. Every method is cheap and never raises for unknown label values.

    All arguments are asked at each scrape: `agents` gives counts by state, `maps` (entries, capacity) by map name,
    `auth` calls by result and the size of the token caches (`entries`), `tokens` those issued by client and those
    refused by error, `certificates` their end in Unix seconds by name.
    """

    def __init__(
        self,
        *,
        flows: FlowLog | None = None,
        components: Callable[[], Iterable[Component]] = tuple,
        agents: Callable[[], Mapping[str, int]] = dict,
        maps: Callable[[], Mapping[str, tuple[int, int]]] = dict,
        state: Callable[[], Mapping[str, float]] = dict,
        ready: Callable[[], bool] = bool,
        auth: Callable[[], Mapping[str, int]] = dict,
        tokens: Callable[[], tuple[Mapping[str, int], Mapping[str, int]]] = lambda: ({}, {}),
        certificates: Callable[[], Mapping[str, float]] = dict,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._decisions: dict[tuple[str, str, str], int] = {}
        self._flows = flows
        self._components = components
        self._agents = agents
        self._maps = maps
        self._state = state
        self._ready = ready
        self._auth = auth
        self._tokens = tokens
        self._certificates = certificates
        self._wall = wall
        r = self.registry
        self.info = Gauge(f"{PREFIX}_info", "What runs.", ["version", "engine", "stack", "accel"], registry=r)
        self.policy_apply = Histogram(
            f"{PREFIX}_policy_apply_seconds", "Rule change to enforced.", ["result"], buckets=SECONDS, registry=r
        )
        self.connections_cut = Counter(f"{PREFIX}_connections_cut", "Connections ended.", ["cause"], registry=r)
        self.dns_queries = Counter(f"{PREFIX}_dns_queries", "Questions.", ["result"], registry=r)
        self.dns_seconds = Histogram(
            f"{PREFIX}_dns_seconds", "Question to answer.", ["path"], buckets=FAST_SECONDS, registry=r
        )
        self.auth_seconds = Histogram(
            f"{PREFIX}_auth_seconds", "Asking about a token.", ["result"], buckets=SECONDS, registry=r
        )
        self.rpcs = Counter(f"{PREFIX}_rpc", "Calls.", ["method", "code"], registry=r)
        self.rpc_seconds = Histogram(
            f"{PREFIX}_rpc_seconds", "Call to answer.", ["method", "code"], buckets=SECONDS, registry=r
        )
        self.loop_lag = Histogram(
            f"{PREFIX}_loop_lag_seconds", "How late the loop runs.", buckets=FAST_SECONDS, registry=r
        )
        r.register(_State(self))

    def describe(self, version: str, engine: str, stack: str, accel: str) -> None:
        """
        Say what runs.
        """
        self.info.labels(version, engine, stack, accel).set(1)

    def count_dns(self, verdict: str, seconds: float, *, cached: bool) -> None:
        """
        Count one question of an agent; `verdict` is the gate's: allowed, bypassed, denied, failed.
        """
        result = {"allowed": "answered", "bypassed": "answered", "denied": "denied"}.get(verdict, "failed")
        self.dns_queries.labels(result).inc()
        self.dns_seconds.labels("cache" if cached else "forward").observe(seconds)

    def observe_auth(self, result: str, seconds: float) -> None:
        """
        Take how long one question about a token took: `miss`, `denied` or `error`.
        """
        self.auth_seconds.labels(result).observe(seconds)

    def note(self, line: Mapping[str, Any]) -> None:
        """
        Take a line of the log that says something countable, from any thread; others are left alone.
        """
        event = line.get("event")
        if event in {"policy_applied", "policy_refused"}:
            result = "refused" if event == "policy_refused" else "live" if line.get("live") else "stored"
            self.policy_apply.labels(result).observe(int(line.get("apply_us") or 0) / 1e6)
            cut, cause = int(line.get("connections_cut") or 0), "rule"
        elif event == "connections_cut" and line.get("cause") != "rule":  # those of a rule are in `policy_applied`
            cut, cause = int(line.get("count") or 0), str(line.get("cause"))
        else:
            return
        if cut:
            self.connections_cut.labels(cause if cause in CUT_CAUSES else "other").inc(cut)

    async def watch_loop(self, clock: Clock = SYSTEM_CLOCK) -> None:
        """
        Measure how late the loop runs what is due, until cancelled.
        """
        while True:
            due = clock.monotonic() + LAG_EVERY_S
            await clock.sleep(LAG_EVERY_S)
            self.loop_lag.observe(max(clock.monotonic() - due, 0.0))

    def count_flows(self, flows: Iterable[Flow]) -> None:
        """
        Count decisions by layer, verdict and reason.
        """
        decisions = self._decisions
        for flow in flows:
            key = (flow.layer, flow.verdict, flow.reason if flow.reason in _REASONS else "other")
            decisions[key] = decisions.get(key, 0) + 1

    def count_rpc(self, method: str, code: str, seconds: float) -> None:
        """
        Count one served call; `method` is the full name of a method that exists.
        """
        name = method.rpartition("/")[2]
        self.rpcs.labels(name, code).inc()
        self.rpc_seconds.labels(name, code).observe(seconds)

    def collect(self) -> Iterable[Metric]:
        """
        The gauges and counters that are read from elsewhere.
        """
        decided = CounterMetricFamily(f"{PREFIX}_decisions", "Decisions.", labels=["layer", "verdict", "reason"])
        for (layer, verdict, reason), count in sorted(self._decisions.items()):
            decided.add_metric([_LAYERS.get(layer, "other"), _VERDICTS.get(verdict, "other"), reason], count)
        yield decided
        if self._flows is not None:
            yield CounterMetricFamily(f"{PREFIX}_flow_records", "Flow records taken.", value=self._flows.taken)
            lost = CounterMetricFamily(f"{PREFIX}_flow_lost", "Flow records lost.", labels=["where"])
            counts = self._flows.lost
            for where in ("kernel", "queue", "subscriber", "export"):
                lost.add_metric([where], counts[where])
            yield lost
        health = GaugeMetricFamily(f"{PREFIX}_component_health", "0 failed, 1 degraded, 2 ok.", labels=["component"])
        for component in self._components():
            if component.health in _HEALTH:
                health.add_metric([component.name], _HEALTH[component.health])
        yield health
        agents = GaugeMetricFamily(f"{PREFIX}_agents", "Agents by state.", labels=["state"])
        states = self._agents()
        for state in AGENT_STATES:
            agents.add_metric([state], states.get(state, 0))
        yield agents
        entries = GaugeMetricFamily(f"{PREFIX}_map_entries", "Rows of a kernel map.", labels=["map"])
        capacity = GaugeMetricFamily(f"{PREFIX}_map_capacity", "Rows a kernel map can hold.", labels=["map"])
        for name, (used, most) in sorted(self._maps().items()):
            entries.add_metric([name], used)
            capacity.add_metric([name], most)
        yield entries
        yield capacity
        yield from self._collect_surface()
        values = self._state()
        for name in ("policy_version", "policies", "rules", "routes"):
            if name in values:
                yield GaugeMetricFamily(f"{PREFIX}_{name}", name.replace("_", " ").capitalize(), value=values[name])

    def _collect_surface(self) -> Iterable[Metric]:
        yield GaugeMetricFamily(f"{PREFIX}_ready", "1 once ready.", value=float(self._ready()))
        restarts = CounterMetricFamily(f"{PREFIX}_child_restarts", "Children started again.", labels=["child"])
        for component in self._components():
            if component.restarts:
                restarts.add_metric([component.name], component.restarts)
        yield restarts
        counts = self._auth()
        calls = CounterMetricFamily(f"{PREFIX}_auth", "Calls by how they were judged.", labels=["result"])
        for result, key in (("hit", "hit"), ("miss", "miss"), ("denied", "refused"), ("error", "error")):
            calls.add_metric([result], counts.get(key, 0))
        yield calls
        yield GaugeMetricFamily(f"{PREFIX}_token_cache_entries", "Cached answers.", value=counts.get("entries", 0))
        issued, refused = self._tokens()
        for name, label, by in (("tokens_issued", "client", issued), ("tokens_refused", "error", refused)):
            family = CounterMetricFamily(f"{PREFIX}_{name}", name.replace("_", " ").capitalize(), labels=[label])
            for value, count in sorted(by.items()):
                family.add_metric([value], count)
            yield family
        ends = GaugeMetricFamily(
            f"{PREFIX}_certificate_expiry_seconds", "Seconds until a certificate ends.", labels=["name"]
        )
        now = self._wall()
        for name, end in sorted(self._certificates().items()):
            ends.add_metric([name], end - now)
        yield ends

    def render(self) -> bytes:
        """
        The body of a scrape, of type `CONTENT_TYPE`.
        """
        return generate_latest(self.registry)


class _State(Collector):
    """Asks `Metrics` at each scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.collect()
