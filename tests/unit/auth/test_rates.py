"""One bucket per address, refilled with time."""

from __future__ import annotations

from clawker_cp.auth.rates import ADDRESSES_KEPT, BURST, RateLimit, too_many


def test_a_burst_passes_and_then_so_many_a_second() -> None:
    """Beyond the burst an address waits; another one does not."""
    now = [0.0]
    rate = RateLimit(2, monotonic=lambda: now[0])
    assert [rate.admits("a") for _ in range(BURST)] == [True] * BURST
    assert rate.admits("a") is False
    assert rate.admits("b") is True
    now[0] += 1.0
    assert [rate.admits("a") for _ in range(3)] == [True, True, False]


def test_zero_is_no_limit_and_addresses_are_bounded() -> None:
    """The address that asked longest ago is forgotten first, which costs nobody but the limit."""
    assert all(RateLimit(0).admits("a") for _ in range(BURST * 2))
    rate = RateLimit(1, monotonic=lambda: 0.0)
    for _ in range(BURST):
        rate.admits("first")
    for number in range(ADDRESSES_KEPT):
        rate.admits(str(number))
    assert rate.admits("first") is True
    assert (too_many().status, too_many().headers["Retry-After"]) == (429, "1")
