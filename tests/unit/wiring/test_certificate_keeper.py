"""Renewal and take-over, by the clock."""

from __future__ import annotations

import asyncio
import datetime as dt

from clawker_cp.testing.clock import FakeClock
from clawker_cp.wiring.certificate_keeper import LOOK_EVERY_S, RENEW_EVERY_S, CertificateKeeper


class Parts:
    """A tree, an authority and an inspection that count; the leaves of inspection end in half an hour."""

    def __init__(self, clock: FakeClock) -> None:
        self.done: list[str] = []
        self.due = dt.datetime.fromtimestamp(clock.wall_ns() / 1e9, dt.UTC) + dt.timedelta(minutes=30)

    def renew(self) -> None:
        self.done.append("renew")

    async def refresh(self) -> None:
        self.done.append("refresh")

    def next_renewal(self) -> dt.datetime:
        return self.due

    async def reconcile(self) -> None:
        self.done.append("reconcile")


async def test_it_looks_often_and_renews_now_and_then() -> None:
    """Files that somebody else replaced are used within seconds; leaves of inspection only while there is a proxy."""
    clock = FakeClock()
    parts, up = Parts(clock), [False]
    keeper = CertificateKeeper(parts, parts, parts, reconcile=parts.reconcile, up=lambda: up[0], clock=clock)
    running = asyncio.ensure_future(keeper.run())
    await clock.wait_sleeping()
    assert parts.done == ["renew", "refresh"]
    await clock.advance(LOOK_EVERY_S)
    await clock.wait_sleeping()
    assert parts.done == ["renew", "refresh", "refresh"]
    for seen in (["renew"], ["renew", "reconcile"]):
        parts.done.clear()
        await clock.advance(RENEW_EVERY_S)
        await clock.wait_sleeping()
        assert [what for what in parts.done if what != "refresh"] == seen
        up[0] = True
    running.cancel()
    await asyncio.wait([running])
