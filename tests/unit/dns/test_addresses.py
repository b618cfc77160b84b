"""
Which addresses may be answered.
"""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawker_cp.dns.addresses import AddressFilter, kernel_form

RESERVED = AddressFilter([ipaddress.ip_network("198.51.100.0/24"), ipaddress.ip_network("2001:db8:1::/48")])


def admits(text: str, *, private: bool = False) -> bool:
    return RESERVED.admits(ipaddress.ip_address(text).packed, private=private)


@pytest.mark.parametrize("text", ["203.0.113.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2001:db8::1", "2606::1"])
def test_public_addresses_pass(text: str) -> None:
    """Addresses of the internet may be answered."""
    assert admits(text)


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.0.1", "169.254.169.254", "224.0.0.1", "239.1.1.1", "240.0.0.1",
        "255.255.255.255", "198.51.100.1", "::", "::1", "fe80::1", "fec0::1", "ff02::1", "2001:db8:1::5",
    ],
)  # fmt: skip
def test_never(text: str) -> None:
    """Loopback, link-local, multicast, broadcast and reserved addresses never pass, private or not."""
    assert not admits(text)
    assert not admits(text, private=True)


@pytest.mark.parametrize(
    "text",
    ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.127.255.255", "fc00::1", "fd12::1"],
)
def test_private_addresses_need_permission(text: str) -> None:
    """Private ranges pass only where the rule or the zone allows them."""
    assert not admits(text)
    assert admits(text, private=True)


@pytest.mark.parametrize(
    ("prefix", "suffix"), [("::ffff:", ""), ("64:ff9b::", ""), ("::", "")], ids=["mapped", "nat64", "compatible"]
)
@pytest.mark.parametrize("inner", ["127.0.0.1", "169.254.1.1", "198.51.100.7"])
def test_forms_that_carry_an_address(prefix: str, suffix: str, inner: str) -> None:
    """An IPv6 form counts as the IPv4 address it ends up as."""
    assert not admits(f"{prefix}{inner}{suffix}", private=True)
    assert not admits(f"{prefix}10.0.0.1")
    assert admits(f"{prefix}203.0.113.5")


def test_6to4_teredo_and_local_nat64() -> None:
    """6to4, Teredo and the local NAT64 prefix are looked into as well."""
    assert not admits("2002:7f00:1::1", private=True)
    assert not admits("2002:c633:6401::1", private=True)
    assert not admits("2002:a00:1::")
    assert admits("2002:cb00:7105::1")
    teredo = "2001:0:cb00:7105:0:0:" + ":".join(f"{0xFFFF ^ part:x}" for part in (0x7F00, 0x0001))
    assert not admits(teredo, private=True)
    assert not admits("64:ff9b:1:7f00:0:100::", private=True)
    assert not admits("64:ff9b:1::127.0.0.1", private=True)


@given(st.binary(min_size=4, max_size=4))
def test_mapped_equals_plain(packed: bytes) -> None:
    """No IPv4 address gets through as a mapped form that would not get through as itself."""
    for private in (False, True):
        assert RESERVED.admits(kernel_form(packed), private=private) == RESERVED.admits(packed, private=private)


def test_kernel_form() -> None:
    """The kernel's key is 16 octets."""
    assert kernel_form(b"\x01\x02\x03\x04") == bytes(10) + b"\xff\xff\x01\x02\x03\x04"
    assert kernel_form(bytes(16)) == bytes(16)
