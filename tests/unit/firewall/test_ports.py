"""Port specifications (contract 7.2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.firewall import ports
from clawker_cp.firewall.ports import PortError, effective_ports, parse_ports


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("   ", None),
        ("443", (443, 443)),
        (" 443 ", (443, 443)),
        ("9000-9100", (9000, 9100)),
        (" 9000 - 9100 ", (9000, 9100)),
        ("1-65535", (1, 65535)),
        ("007", (7, 7)),
    ],
)
def test_a_port_specification_is_empty_one_number_or_a_range(text: str, found: tuple[int, int] | None) -> None:
    """Spaces around numbers do not matter."""
    assert parse_ports(text) == found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("http", ports.NOT_A_NUMBER),
        ("4 43", ports.NOT_A_NUMBER),
        ("١٢", ports.NOT_A_NUMBER),
        ("+1", ports.NOT_A_NUMBER),
        ("0", ports.OUT_OF_RANGE),
        ("65536", ports.OUT_OF_RANGE),
        ("9" * 5000, ports.OUT_OF_RANGE),
        ("1-65536", ports.OUT_OF_RANGE),
        ("9-8", ports.REVERSED),
        ("9-", ports.MALFORMED),
        ("-9", ports.MALFORMED),
        ("-", ports.MALFORMED),
        ("1-2-3", ports.NOT_A_NUMBER),
    ],
)
def test_the_four_port_problems_are_told_apart(text: str, problem: str) -> None:
    """Not a number, out of range, reversed, malformed."""
    with pytest.raises(PortError, match="^" + problem.replace(".", r"\.")):
        parse_ports(text)


@given(st.text(max_size=20))
def test_any_text_is_a_range_or_a_port_problem(text: str) -> None:
    """No other exception, and every accepted range is in order and in bounds."""
    try:
        found = parse_ports(text)
    except PortError:
        return
    assert found is None or 1 <= found[0] <= found[1] <= 65535


@pytest.mark.parametrize(
    ("proto", "port"), [("https", 443), ("wss", 443), ("http", 80), ("ws", 80), ("ssh", 22), ("tcp", 443), ("udp", 443)]
)
def test_an_empty_port_means_the_default_of_the_protocol(proto: str, port: int) -> None:
    """tcp and udp have none of their own: 443."""
    assert effective_ports(proto, "") == (port, port)
