"""Refusals are logged, and whoever is refused cannot fill the log."""

from __future__ import annotations

from clawker_cp.rpc.interceptors.denials import BURST, DenialLog
from clawker_cp.testing.rpc_world import Log


class Clock:
    now = 100.0


def test_a_burst_is_written_and_the_rest_is_counted() -> None:
    """The first line after the gap says how many were left out; the total counts all."""
    log, clock = Log(), Clock()
    denials = DenialLog(log, monotonic=lambda: clock.now)
    for number in range(1000):
        denials.report(method=str(number))
    assert [fields["method"] for _, _, fields in log.lines] == [str(number) for number in range(BURST)]
    clock.now += 1.0
    for _ in range(1000):
        denials.report(method="later")
    later = [fields for _, _, fields in log.lines[BURST:]]
    assert later == [{"method": "later", "suppressed": 1000 - BURST}, *[{"method": "later"}] * 4]
    assert denials.total == 2000 and set(log.events()) == {"auth_denied"}


def test_a_quiet_hour_allows_no_more_than_one_burst() -> None:
    """Unused lines are not saved up."""
    log, clock = Log(), Clock()
    denials = DenialLog(log, monotonic=lambda: clock.now)
    clock.now += 3600.0
    for _ in range(100):
        denials.report()
    assert len(log.lines) == BURST
