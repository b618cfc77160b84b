"""
What a learning run would have needed.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from clawker_cp.telemetry.flows import ALLOWED, BYPASSED, DENIED, DNS, KERNEL, PROXY, REDIRECTED, Flow
from clawker_cp.telemetry.learn import Destination, learned


def proxy(host: str, proto: str = "https", port: int = 443, verdict: str = ALLOWED, **more: Any) -> Flow:
    return Flow(layer=PROXY, host=host, proto=proto, port=port, verdict=verdict, reason="forwarded", **more)


def kernel(address: str, proto: str = "tcp", port: int = 5432, **more: Any) -> Flow:
    return Flow(
        **{
            "layer": KERNEL,
            "address": address,
            "proto": proto,
            "port": port,
            "verdict": ALLOWED,
            "reason": "learn",
            **more,
        }
    )


@pytest.mark.parametrize(
    ("flows", "rules"),
    [
        ([], []),
        ([proxy("a.example"), proxy("a.example", status=200)], [("a.example", "https", 443)]),
        ([proxy("a.example", "http", 80), proxy("a.example")],
         [("a.example", "http", 80), ("a.example", "https", 443)]),
        ([proxy("a.example"), proxy("a.example", "wss")], [("a.example", "wss", 443)]),
        ([proxy("a.example"), proxy("a.example", "wss", 8443)],
         [("a.example", "https", 443), ("a.example", "wss", 8443)]),
        ([proxy("a.example", "quic")], [("a.example", "https", 443)]),
        ([proxy("a.example", verdict=DENIED)], []),
        ([kernel("203.0.113.5", port=22)], [("git.example", "ssh", 22)]),
        ([kernel("203.0.113.9")], [("203.0.113.9", "tcp", 5432)]),
        ([kernel("203.0.113.9", host="db.example")], [("db.example", "tcp", 5432)]),
        ([kernel("203.0.113.9", verdict=BYPASSED)], [("203.0.113.9", "tcp", 5432)]),
        ([kernel("203.0.113.9", "udp", 123)], [("203.0.113.9", "udp", 123)]),
        ([kernel("203.0.113.9", "icmp", 0), kernel("203.0.113.9", "raw", 1)], []),
        ([kernel("203.0.113.9", verdict=DENIED)], []),
        ([kernel("203.0.113.9", reason="loopback")], []),
        ([kernel("203.0.113.9", reason="name_route", verdict=REDIRECTED)], []),
        ([kernel("", host="a.example", port=443), proxy("a.example")], [("a.example", "https", 443)]),
        ([kernel("", "udp", 443, host="a.example"), proxy("a.example")],
         [("a.example", "https", 443), ("a.example", "udp", 443)]),
        ([Flow(layer=DNS, host="only.asked", verdict=ALLOWED)], []),
    ],
)  # fmt: skip
def test_minimal(flows: list[Flow], rules: list[tuple[str, str, int]]) -> None:
    """One rule per destination that was reached, none that another covers."""
    names = {"203.0.113.5": "git.example"}

    assert learned(flows, lambda address: names.get(address, "")) == [Destination(*rule) for rule in rules]


def test_order_does_not_matter() -> None:
    """The same run gives the same file: names before addresses, each sorted."""
    flows = [proxy(f"{name}.example", proto, port) for name in "cab" for proto, port in (("https", 443), ("wss", 443))]
    flows += [kernel("203.0.113.9"), kernel("198.51.100.1", "udp", 53)]
    expected = learned(flows)
    for seed in range(10):
        random.Random(seed).shuffle(flows)

        assert learned(flows) == expected
    assert [d.host for d in expected] == ["a.example", "b.example", "c.example", "198.51.100.1", "203.0.113.9"]
