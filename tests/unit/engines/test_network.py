"""Addresses and names of sandboxes."""

from __future__ import annotations

import pytest

from clawker_cp.engines.host.network import AddressPool, gateway_of, interface_prefix, mac_of
from clawker_cp.errors import CapacityExceeded


def test_addresses_go_round_and_end() -> None:
    """The gateway, network and broadcast addresses are never given; a freed one comes last; none left is an error."""
    pool = AddressPool("10.231.80.0/29")
    taken = [pool.take([]) for _ in range(2)]
    assert taken == ["10.231.80.2", "10.231.80.3"]
    assert pool.take(["10.231.80.3"]) == "10.231.80.4"
    everything = [f"10.231.80.{last}" for last in (2, 3, 4, 5)]
    assert pool.take(everything) == "10.231.80.6"
    with pytest.raises(CapacityExceeded) as refused:
        pool.take([*everything, "10.231.80.6"])
    assert refused.value.limit == "agents"
    assert pool.take(["10.231.80.6"]) == "10.231.80.2"


def test_hardware_address_is_local_and_unique() -> None:
    """Each address has its own locally administered unicast hardware address."""
    assert gateway_of("10.231.80.0/20") == "10.231.80.1"
    macs = {mac_of(f"10.231.{third}.{last}") for third in range(80, 96) for last in range(256)}
    assert len(macs) == 16 * 256
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)


def test_interface_names_fit_and_tell_bridges_apart() -> None:
    """Prefix and nine digits of an id stay within an interface name."""
    assert len(interface_prefix("clawker0") + "0" * 9) == 15
    assert interface_prefix("clawker0") != interface_prefix("clawker1")
