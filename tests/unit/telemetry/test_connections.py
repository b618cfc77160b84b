"""
Which proxied connections live.
"""

from __future__ import annotations

import pytest

from clawker_cp.telemetry.connections import LIMIT_PER_AGENT, Connections, Live

A = Live("a.example", 443, True, 12000)
B = Live("b.example", 443, True, 12000)


def test_the_last_host_of_a_connection_is_known_until_its_agent_is_gone() -> None:
    """A later record of a source port replaces the earlier one; agents are kept apart."""
    live = Connections()
    live.see("10.0.0.2:4000", A)
    live.see("10.0.0.2:4000", B)
    live.see("10.0.0.3:4000", A)

    assert live.of("10.0.0.2") == {4000: B}
    live.forget("10.0.0.2")
    assert live.of("10.0.0.2") == {}
    assert live.of("10.0.0.3") == {4000: A}


def test_bounded_per_agent() -> None:
    """An agent with too many connections loses its own oldest."""
    live = Connections()
    for port in range(LIMIT_PER_AGENT + 2):
        live.see(f"10.0.0.2:{port}", A)

    assert len(live.of("10.0.0.2")) == LIMIT_PER_AGENT
    assert 1 not in live.of("10.0.0.2")


@pytest.mark.parametrize("remote", ["", "10.0.0.2", "10.0.0.2:", "10.0.0.2:x"])
def test_damaged_records_are_ignored(remote: str) -> None:
    """A record without a usable remote address changes nothing."""
    live = Connections()
    live.see(remote, A)

    assert live.of("10.0.0.2") == {}


def test_beginnings() -> None:
    """Records of a beginning are told from those of an end."""
    assert Connections.begins({"record": "TcpUpstreamConnected"})
    assert not Connections.begins({"record": "DownstreamEnd"})
    assert not Connections.begins({})
