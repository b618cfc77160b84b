"""
Which proxied connections live.
"""

from __future__ import annotations

import pytest

from clawker_cp.telemetry.connections import LIMIT_PER_AGENT, Connections


def test_a_connection_lives_from_its_first_record_to_its_end() -> None:
    """The latest host of a connection is known until its last record; agents are kept apart."""
    live = Connections()
    live.see("10.0.0.2:4000", "", "a.example", 443, tls=True, ends=False)
    live.see("10.0.0.2:4000", "", "b.example", 443, tls=True, ends=False)
    live.see("10.0.0.3:4000", "", "c.example", 80, tls=False, ends=False)

    assert live.of("10.0.0.2") == {4000: ("b.example", 443, True)}
    live.see("10.0.0.2:4000", "", "b.example", 443, tls=True, ends=True)
    assert live.of("10.0.0.2") == {}
    assert live.of("10.0.0.3") == {4000: ("c.example", 80, False)}
    live.forget("10.0.0.3")
    assert live.of("10.0.0.3") == {}


def test_bounded_per_agent() -> None:
    """An agent with too many connections loses its own oldest."""
    live = Connections()
    for port in range(LIMIT_PER_AGENT + 2):
        live.see(f"10.0.0.2:{port}", "", "a.example", 443, tls=True, ends=False)

    assert len(live.of("10.0.0.2")) == LIMIT_PER_AGENT
    assert 1 not in live.of("10.0.0.2")


@pytest.mark.parametrize("remote", ["", "10.0.0.2", "10.0.0.2:", "10.0.0.2:x"])
def test_damaged_records_are_ignored(remote: str) -> None:
    """A record without a usable remote address changes nothing."""
    live = Connections()
    live.see(remote, "", "a.example", 443, tls=True, ends=False)

    assert live.of("10.0.0.2") == {}


def test_beginnings() -> None:
    """Records of a beginning are told from those of an end."""
    assert Connections.begins({"record": "TcpUpstreamConnected"})
    assert not Connections.begins({"record": "DownstreamEnd"})
    assert not Connections.begins({})
