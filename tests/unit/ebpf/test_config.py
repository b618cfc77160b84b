"""An agent's configuration becomes a kernel row and can be read back unchanged."""

from __future__ import annotations

import ipaddress

import pytest

from clawker_cp.ebpf.config import AgentConfig, mapped, mapped_prefix, unmapped

PLAIN = AgentConfig(
    policy=7, proxy_addr="198.51.100.2", dns_addr="198.51.100.3", cp_addr="198.51.100.4", host_addr="198.51.100.5"
)
FULL = AgentConfig(
    policy=2**32 - 1,
    proxy_addr="2001:db8::2",
    dns_addr="2001:db8::3",
    cp_addr="198.51.100.4",
    host_addr="2001:db8::5",
    host_proxy_addr="198.51.100.6",
    host_proxy_port=65535,
    cp_agent_port=1,
    cp_token_port=2,
    cp_health_port=3,
    learn=True,
    ipv6=True,
    quarantined=True,
    bypass_until_ns=2**63,
)


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_a_row_reads_back_as_written(config: AgentConfig) -> None:
    """Every field survives the kernel's form."""
    assert AgentConfig.unpack(config.pack()) == config


@pytest.mark.parametrize("address", ["198.51.100.1", "0.0.0.0", "2001:db8::1", "::"])
def test_an_address_has_sixteen_bytes(address: str) -> None:
    """IPv4 is mapped on the way in and unmapped on the way out."""
    assert len(mapped(address)) == 16
    assert unmapped(mapped(address)) == address


def test_a_prefix_counts_from_the_mapped_form() -> None:
    """An IPv4 prefix is 96 bits longer in the kernel; IPv6 stays."""
    assert mapped_prefix(ipaddress.ip_network("198.51.100.0/24")) == (mapped("198.51.100.0"), 120)
    assert mapped_prefix(ipaddress.ip_network("2001:db8::/32")) == (mapped("2001:db8::"), 32)
