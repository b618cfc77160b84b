"""
Numbers for Prometheus.
"""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

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
    metrics = Metrics()
    metrics.info.labels("1", "host", "embedded", "fast").set(1)
    metrics.connections_cut.labels("rule").inc(2)
    metrics.dns_queries.labels("answered").inc()
    metrics.dns_seconds.labels("cache").observe(0.0001)
    metrics.policy_apply.labels("live").observe(0.02)
    metrics.child_restarts.labels("envoy").inc()
    found = samples(metrics)

    assert found["clawker_cp_connections_cut_total", "rule"] == 2
    assert found["clawker_cp_dns_queries_total", "answered"] == 1
    assert found["clawker_cp_dns_seconds_count", "cache"] == 1
    assert found["clawker_cp_policy_apply_seconds_count", "live"] == 1
    assert found["clawker_cp_child_restarts_total", "envoy"] == 1
    assert found["clawker_cp_info", "fast", "host", "embedded", "1"] == 1


def test_two_servers_do_not_share() -> None:
    """Each instance has numbers of its own."""
    first, second = Metrics(), Metrics()
    first.ready.set(1)

    assert samples(first)[("clawker_cp_ready",)] == 1
    assert samples(second)[("clawker_cp_ready",)] == 0
