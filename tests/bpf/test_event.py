"""Records and counters: budgets, sequence numbers, quotas, and what is lost is counted."""

from __future__ import annotations

import pytest

from clawker_cp._fast import layout
from clawker_cp.testing.bpf_abi import ABI
from clawker_cp.testing.bpf_cases import Decisions

pytestmark = pytest.mark.root

DENY, ALLOW, BYPASS = ABI.V_DENIED, ABI.V_REDIRECTED, ABI.V_BYPASSED


def suppressed(kernel: Decisions, cgroup: int) -> dict[str, int]:
    row = kernel.maps["state_map"].get(cgroup.to_bytes(8, "little"))
    assert row is not None
    return layout.unpack_state(row)


def test_sequence_numbers_of_an_agent_have_no_gap(kernel: Decisions) -> None:
    """Each agent counts its own decisions from one, whatever the verdict."""
    kernel.state(6)
    for _ in range(3):
        kernel.record(5, DENY, ABI.R_NO_ROUTE)
        kernel.record(5, ALLOW, ABI.R_NAME_ROUTE)
        kernel.record(6, DENY, ABI.R_NO_ROUTE)

    events = kernel.events()

    assert [e.sequence for e in events if e.cgroup_id == 5] == [1, 2, 3, 4, 5, 6]
    assert [e.sequence for e in events if e.cgroup_id == 6] == [1, 2, 3]


def test_budgets_are_separate(kernel: Decisions) -> None:
    """A flood of one kind of record hides no other kind, and its missing records show as a gap (threat 26)."""
    kernel.control(budget=(5, 3, 2))
    kernel.record(5, ALLOW, ABI.R_NAME_ROUTE, times=20)
    kernel.record(5, BYPASS, ABI.R_BYPASS, times=20)
    kernel.record(5, DENY, ABI.R_NO_ROUTE)

    events = kernel.events()

    assert [e.verdict for e in events] == [ALLOW] * 2 + [BYPASS] * 3 + [DENY]
    assert events[-1].sequence == 41
    assert suppressed(kernel, 5) == {"sequence": 41, "suppressed": 35, "uncounted": 0}


def test_counters_are_exact_when_records_are_suppressed(kernel: Decisions) -> None:
    """Every decision is counted whether it is recorded or not."""
    kernel.control(budget=(1, 1, 1))
    kernel.record(5, DENY, ABI.R_NO_ROUTE, identity=300, times=500)
    kernel.record(5, DENY, ABI.R_NO_ROUTE, identity=300, quiet=True, times=7)

    assert kernel.counters(5) == {(300, 443, "denied", "no_route"): 507}
    assert len(kernel.events()) == 1


def test_an_agent_cannot_fill_the_counters(kernel: Decisions) -> None:
    """Beyond its quota an agent's decisions are counted in its overflow row; others keep their room (threat 26)."""
    kernel.state(6)
    for identity in range(1000, 1000 + ABI.METRIC_ROWS + 50):
        kernel.record(5, DENY, ABI.R_NO_ROUTE, identity=identity, quiet=True)
    kernel.record(6, DENY, ABI.R_NO_ROUTE, identity=9)

    counted = kernel.counters(5)

    assert len(counted) == ABI.METRIC_ROWS + 1
    assert counted[0, 0, "denied", "no_route"] == 50
    assert kernel.counters(6) == {(9, 443, "denied", "no_route"): 1}


def test_high_ports_share_a_bucket(kernel: Decisions) -> None:
    """Ports above 1023 that are not redirected are counted together: a scan makes one row."""
    for port in range(2000, 2100):
        kernel.record(5, DENY, ABI.R_NO_ROUTE, port=port)

    assert kernel.counters(5) == {(0, 0, "denied", "no_route"): 100}


def test_the_not_enrolled_are_counted_together(kernel: Decisions) -> None:
    """Cgroups without a state row share that of nobody, and still name themselves in the record."""
    kernel.record(77, DENY, ABI.R_NOT_ENROLLED)
    kernel.record(78, DENY, ABI.R_NOT_ENROLLED)

    events = kernel.events()

    assert [(e.cgroup_id, e.sequence) for e in events] == [(77, 1), (78, 2)]
    assert kernel.counters(0) == {(0, 443, "denied", "not_enrolled"): 2}


def test_a_full_ring_loses_records_visibly(kernel: Decisions) -> None:
    """What the ring has no room for is a gap in the sequence and an error count, never a wait (I12)."""
    kernel.control(budget=(10**9, 10**9, 10**9))
    total = 4 * 1024 * 1024 // 96 + 1000
    before = lost_records(kernel)
    kernel.record(5, DENY, ABI.R_NO_ROUTE, times=total)

    events = kernel.events()
    kernel.record(5, DENY, ABI.R_NO_ROUTE)
    (after,) = kernel.events()

    assert len(events) < total
    assert lost_records(kernel) - before == total - len(events)
    assert after.sequence == total + 1
    assert kernel.counters(5)[0, 443, "denied", "no_route"] == total + 1


def lost_records(kernel: Decisions) -> int:
    return kernel.errors().get(("ring", 0), 0)
