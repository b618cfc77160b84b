"""The agents' network by the engine's record, and the addresses that follow."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.config import NetworkSettings, Octets
from clawker_cp.engines.docker.network import addresses, creation, free_range, read_plan
from clawker_cp.errors import Conflict, InvalidInput

ID = "5f" * 32


def record(*config: dict[str, str], **changes: Any) -> dict[str, Any]:
    made = list(config) or [{"Subnet": "10.231.96.0/20", "Gateway": "10.231.96.1"}]
    return {"Name": "clawker-net", "Id": ID, "Driver": "bridge", "IPAM": {"Config": made}, "Options": {}, **changes}


def test_network_of_the_engine_is_read() -> None:
    """Subnet, gateway and bridge; the bridge is named for the network unless an option says otherwise."""
    plan = read_plan(record())

    assert (plan.id, plan.subnet, plan.gateway) == (ID, IPv4Network("10.231.96.0/20"), IPv4Address("10.231.96.1"))
    assert plan.bridge == "br-5f5f5f5f5f5f"
    assert read_plan(record(Options={"com.docker.network.bridge.name": "ck0"})).bridge == "ck0"
    assert read_plan(record(Options=None)).bridge == "br-5f5f5f5f5f5f"


def test_gateway_with_a_length_and_a_second_family_are_understood() -> None:
    """Older engines write the length behind the gateway; the IPv6 half of a dual network is left alone."""
    both = read_plan(
        record(
            {"Subnet": "fd00::/64", "Gateway": "fd00::1"},
            {"Subnet": "172.18.0.0/16", "Gateway": "172.18.0.1/16"},
        )
    )

    assert both.gateway == IPv4Address("172.18.0.1")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (record(Driver="macvlan"), "macvlan"),
        (record({"Subnet": "fd00::/64", "Gateway": "fd00::1"}), "no IPv4 subnet"),
        (record({"Subnet": "10.231.96.0/20"}), "no gateway"),
        (record({"Subnet": "10.231.96.0/20", "Gateway": "192.0.2.1"}), "outside its subnet"),
        (record({"Subnet": "nonsense", "Gateway": "192.0.2.1"}), "cannot be read"),
        (record({"Subnet": "10.231.96.0/20", "Gateway": "x"}), "cannot be read"),
        (record(IPAM={"Config": None}), "no IPv4 subnet"),
        (record(IPAM=None), "no IPv4 subnet"),
        (record(IPAM={"Config": ["x"]}), "cannot be read"),
    ],
)
def test_network_that_cannot_serve_is_told_with_what_to_do(broken: dict[str, Any], words: str) -> None:
    """Each fault is named, and the hint says how to get a network that serves."""
    with pytest.raises(Conflict, match=words) as refused:
        read_plan(broken)

    assert "docker network rm" in str(refused.value.hint)


def test_on_a_host_the_gateway_serves_everything() -> None:
    """A control plane on the host has one address on the network: the gateway."""
    network = addresses(read_plan(record()), own=None)

    assert (network.proxy, network.dns, network.cp) == ("10.231.96.1",) * 3
    assert (network.subnet, network.gateway, network.bridge) == ("10.231.96.0/20", "10.231.96.1", "br-5f5f5f5f5f5f")


def test_as_a_container_it_serves_itself_and_a_sibling_proxies() -> None:
    """Our own address serves names and the control plane; the proxy's is a sibling's where there is one."""
    plan = read_plan(record())
    network = addresses(plan, own=plan.static(202), proxy=plan.static(200))

    assert (network.proxy, network.dns, network.cp) == ("10.231.96.200", "10.231.96.202", "10.231.96.202")
    assert addresses(plan, own=plan.static(202)).served == {"10.231.96.202"}


@pytest.mark.parametrize(
    ("subnet", "gateway", "octet"),
    [
        ("10.0.0.0/29", "10.0.0.1", 202),
        ("10.0.0.0/24", "10.0.0.202", 202),
        ("10.0.0.0/24", "10.0.0.1", 255),
        ("10.0.0.0/24", "10.0.0.1", 0),
        ("10.0.0.128/25", "10.0.0.129", 1),
    ],
)
def test_static_address_that_is_not_free_for_us_is_refused(subnet: str, gateway: str, octet: int) -> None:
    """Outside the subnet, its edges, or the gateway itself: told by the address and the setting."""
    with pytest.raises(Conflict, match="network.octets"):
        read_plan(record({"Subnet": subnet, "Gateway": gateway})).static(octet)


def test_creation_leaves_the_static_addresses_out_of_the_range() -> None:
    """The engine hands out addresses from a part of the subnet that has none of ours (R2)."""
    assert creation(NetworkSettings()) == [
        {"Subnet": "10.231.96.0/20", "Gateway": "10.231.96.1", "IPRange": "10.231.104.0/21"}
    ]
    small = NetworkSettings(subnet="10.9.9.0/24", octets=Octets(envoy=10, dns=11, cp=12))
    assert creation(small)[0]["IPRange"] == "10.9.9.128/25"
    tiny = NetworkSettings(subnet="10.9.9.0/28")
    assert creation(tiny)[0]["IPRange"] == "10.9.9.0/28"


@given(st.integers(8, 28), st.sets(st.integers(2, 254), min_size=1, max_size=3))
def test_range_is_inside_the_subnet_and_free_of_what_is_fixed(length: int, octets: set[int]) -> None:
    """For every subnet and choice of octets the range is a part of the subnet without a fixed address."""
    subnet = IPv4Network((int(IPv4Address("10.0.0.0")), length))
    fixed = [subnet.network_address + octet for octet in octets if subnet.network_address + octet in subnet]
    try:
        part = free_range(subnet, fixed)
    except InvalidInput:
        assert length >= 27
        return

    assert part.subnet_of(subnet)
    assert not any(address in part for address in fixed)
