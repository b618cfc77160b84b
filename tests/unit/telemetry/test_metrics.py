"""
Numbers for Prometheus.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from clawker_cp.runtime.clock import SystemClock
from clawker_cp.runtime.health import Component, Health
from clawker_cp.telemetry.flowlog import FlowLog
from clawker_cp.telemetry.flows import DENIED, DNS, KERNEL, Flow
from clawker_cp.telemetry.metrics import Metrics


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    # Name, then label values in the order of their label names.
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, *dict(sorted(s.labels.items())).values()): s.value for family in families for s in family.samples}


def test_state_is_read_at_the_scrape(tmp_path: Path) -> None:
    """Agents, components, maps and losses are those of the moment of the scrape."""
    flows = FlowLog(tmp_path / "f")
    metrics = Metrics(
        flows=flows,
        components=lambda: [Component("envoy", health=Health.DEGRADED), Component("fleet", health=Health.OFF)],
        agents=lambda: {"enrolled": 3},
        maps=lambda: {"route_map": (10, 1000)},
        state=lambda: {"policy_version": 7, "rules": 2},
    )
    flows.add([Flow(lost_before=4)])
    found = samples(metrics)

    assert found["clawker_cp_agents", "enrolled"] == 3
    assert found["clawker_cp_agents", "untrusted"] == 0
    assert found["clawker_cp_component_health", "envoy"] == 1
    assert ("clawker_cp_component_health", "fleet") not in found
    assert found["clawker_cp_map_capacity", "route_map"] == 1000
    assert found[("clawker_cp_policy_version",)] == 7
    assert found[("clawker_cp_flow_records_total",)] == 1
    assert found["clawker_cp_flow_lost_total", "kernel"] == 4


def test_decisions_by_reason() -> None:
    """Decisions are counted by layer, verdict and reason; what an agent could choose never becomes a label."""
    metrics = Metrics()
    metrics.count_flows([Flow(layer=KERNEL, verdict=DENIED, reason="no_route")] * 3)
    metrics.count_flows(Flow(layer=DNS, verdict=DENIED, reason=f"made-up-{n}", host=f"{n}.example") for n in range(50))
    found = samples(metrics)

    assert found["clawker_cp_decisions_total", "kernel", "no_route", "denied"] == 3
    assert found["clawker_cp_decisions_total", "dns", "other", "denied"] == 50
    assert "example" not in metrics.render().decode()


def test_counted_where_it_happens() -> None:
    """Counters and histograms have the names and labels of the contract."""
    metrics = Metrics(
        components=lambda: [Component("envoy", health=Health.OK, restarts=2), Component("dns", health=Health.OK)],
        ready=lambda: True,
        auth=lambda: {"hit": 5, "miss": 2, "refused": 3, "error": 1, "entries": 4},
        tokens=lambda: ({"clawker-cli": 7}, {"invalid_client": 8}),
        certificates=lambda: {"tls/server.pem": 1100.0},
        wall=lambda: 1000.0,
    )
    metrics.describe("1", "host", "embedded", "fast")
    for verdict in ("allowed", "bypassed", "denied", "failed"):
        metrics.count_dns(verdict, 0.0001, cached=verdict == "allowed")
    metrics.observe_auth("miss", 0.002)
    metrics.count_rpc("/clawker.admin.v1.AdminService/ListAgents", "OK", 0.001)
    found = samples(metrics)

    for name, value in {
        ("info", "fast", "host", "embedded", "1"): 1,
        ("ready",): 1,
        ("dns_queries_total", "answered"): 2,
        ("dns_queries_total", "denied"): 1,
        ("dns_queries_total", "failed"): 1,
        ("dns_seconds_count", "cache"): 1,
        ("dns_seconds_count", "forward"): 3,
        ("auth_total", "hit"): 5,
        ("auth_total", "miss"): 2,
        ("auth_total", "denied"): 3,
        ("auth_total", "error"): 1,
        ("auth_seconds_count", "miss"): 1,
        ("token_cache_entries",): 4,
        ("tokens_issued_total", "clawker-cli"): 7,
        ("tokens_refused_total", "invalid_client"): 8,
        ("child_restarts_total", "envoy"): 2,
        ("certificate_expiry_seconds", "tls/server.pem"): 100,
        ("rpc_total", "OK", "ListAgents"): 1,
    }.items():
        assert found[f"clawker_cp_{name[0]}", *name[1:]] == value, name
    assert ("clawker_cp_child_restarts_total", "dns") not in found


def test_lines_of_the_log_are_counted() -> None:
    """What was applied, stored, refused and cut, by what the log says of it; each connection once."""
    metrics = Metrics()
    for line in (
        {"event": "policy_applied", "live": True, "apply_us": 20_000, "connections_cut": 2},
        {"event": "policy_applied", "live": False, "apply_us": 10},
        {"event": "policy_refused", "cause": "x"},
        {"event": "connections_cut", "cause": "rule", "count": 2},
        {"event": "connections_cut", "cause": "bypass", "count": 3},
        {"event": "connections_cut", "cause": "an agent's words", "count": 1},
        {"event": "cp_ready"},
        {},
    ):
        metrics.note(line)
    found = samples(metrics)

    for result in ("live", "stored", "refused"):
        assert found["clawker_cp_policy_apply_seconds_count", result] == 1
    cuts = {key[1]: value for key, value in found.items() if key[0] == "clawker_cp_connections_cut_total"}
    assert cuts == {"rule": 2, "bypass": 3, "other": 1}


class LateClock(SystemClock):
    """A clock on which every pause takes two seconds longer; the third one never ends."""

    def __init__(self) -> None:
        self.now, self.pauses = 1000.0, 0
        self.third = asyncio.Event()

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses += 1
        self.now += seconds + 2
        if self.pauses == 3:
            self.third.set()
            await asyncio.Event().wait()


async def test_the_loops_lag_is_measured() -> None:
    """How late the clock is when a pause is over."""
    clock, metrics = LateClock(), Metrics()
    watching = asyncio.ensure_future(metrics.watch_loop(clock))
    await clock.third.wait()
    watching.cancel()

    found = samples(metrics)
    assert found[("clawker_cp_loop_lag_seconds_count",)] == 2
    assert found[("clawker_cp_loop_lag_seconds_sum",)] == 4.0


def test_two_servers_do_not_share() -> None:
    """Each instance has numbers of its own."""
    first, second = Metrics(ready=lambda: True), Metrics()

    assert samples(first)[("clawker_cp_ready",)] == 1
    assert samples(second)[("clawker_cp_ready",)] == 0
