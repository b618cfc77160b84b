"""A decision reads as one line, once for each kind."""

from __future__ import annotations

from typing import Any

import click
import pytest

from clawker_cp.cli.decisions import FirstOfEachKind, decision_line, destination, is_outcome

DENIED = {
    "verdict": "FLOW_VERDICT_DENIED",
    "layer": "LAYER_KERNEL",
    "reason": "no_rule",
    "host": "example.com",
    "port": 443,
    "proto": "tcp",
}


@pytest.mark.parametrize(
    ("flow", "text"),
    [
        ({"host": "a.example", "proto": "dns", "query_type": "AAAA"}, "a.example (AAAA)"),
        ({"address": "2001:db8::1", "port": 5, "proto": "udp"}, "udp://[2001:db8::1]:5"),
        ({"host": "a.example", "port": 80, "proto": "http", "path": "/x"}, "GET http://a.example:80/x"),
        ({}, "other://?"),
    ],
)
def test_destinations_read_like_addresses(flow: dict[str, Any], text: str) -> None:
    """Name before address, brackets around IPv6, method and path when known."""
    assert destination(flow) == text


def test_a_line_says_verdict_destination_and_why() -> None:
    """The line is the same with and without colour, but for the colour."""
    plain = decision_line(DENIED | {"rule_id": "r1"}, colour=False)
    assert plain == "clawker-cp: denied   tcp://example.com:443  [kernel: no_rule, rule r1]"
    coloured = decision_line(DENIED | {"rule_id": "r1"}, colour=True)
    assert coloured != plain and click.unstyle(coloured) == plain


def test_only_the_last_word_is_an_outcome() -> None:
    """The kernel's yes on the way to the proxy is not; refusals, proxy records and direct ways are."""
    allowed = {"verdict": "FLOW_VERDICT_ALLOWED", "layer": "LAYER_KERNEL", "reason": "route"}
    assert is_outcome(DENIED)
    assert not is_outcome(allowed)
    assert is_outcome(allowed | {"reason": "address_rule"})
    assert is_outcome(allowed | {"layer": "LAYER_PROXY"})


def test_a_kind_passes_once_and_beyond_the_limit_always() -> None:
    """A repeat is held back; when the memory is full an unknown kind still shows."""
    first = FirstOfEachKind(limit=1)
    assert [first.passes(DENIED), first.passes(DENIED)] == [True, False]
    other = DENIED | {"port": 80}
    assert [first.passes(other), first.passes(other), first.passes(DENIED)] == [True, True, False]
