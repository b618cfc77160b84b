"""
What the manager is told of an agent and of a name, and how both become kernel rows.

Addresses are text here and 16 bytes in network order (IPv4 mapped) in the kernel.
"""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass
from typing import Protocol

from clawker_cp._fast import layout

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Flag(enum.IntFlag):
    """Bits of `container_map.flags`; equals enum clawker_config_flag."""

    QUARANTINE = 1
    LEARN = 2
    IPV6 = 4
    HOST_PROXY = 8


class InboundFrom(enum.IntEnum):
    """Who may connect to a published port; equals enum clawker_inbound_from."""

    HOST = 1
    ANY = 2
    CONTROL_PLANE = 3


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """
    How one agent's sockets are judged: its policy number and the addresses it is redirected to.

    `bypass_until_ns` is CLOCK_MONOTONIC; 0 = none.
    """

    policy: int
    proxy_addr: str
    dns_addr: str
    cp_addr: str
    host_addr: str
    host_proxy_addr: str = ""
    cp_agent_port: int = 7444
    cp_token_port: int = 4444
    cp_health_port: int = 7080
    host_proxy_port: int = 0
    learn: bool = False
    ipv6: bool = False
    quarantined: bool = False
    bypass_until_ns: int = 0

    def pack(self) -> bytes:
        """
        The row's value.
        """
        flags = (
            (Flag.QUARANTINE if self.quarantined else 0)
            | (Flag.LEARN if self.learn else 0)
            | (Flag.IPV6 if self.ipv6 else 0)
            | (Flag.HOST_PROXY if self.host_proxy_port else 0)
        )
        return layout.pack_config(
            self.policy,
            int(flags),
            self.bypass_until_ns,
            mapped(self.proxy_addr),
            mapped(self.dns_addr),
            mapped(self.cp_addr),
            mapped(self.host_proxy_addr or "0.0.0.0"),
            self.cp_agent_port,
            self.cp_token_port,
            self.cp_health_port,
            self.host_proxy_port,
            mapped(self.host_addr),
        )

    @classmethod
    def unpack(cls, row: bytes) -> AgentConfig:
        """
        Read a row back, as an adopted map has it.
        """
        raw = layout.unpack_config(row)
        flags = raw["flags"]
        return cls(
            policy=raw["policy"],
            proxy_addr=unmapped(raw["proxy_addr"]),
            dns_addr=unmapped(raw["dns_addr"]),
            cp_addr=unmapped(raw["cp_addr"]),
            host_addr=unmapped(raw["host_addr"]),
            host_proxy_addr=unmapped(raw["host_proxy_addr"]) if flags & Flag.HOST_PROXY else "",
            cp_agent_port=raw["cp_agent_port"],
            cp_token_port=raw["cp_token_port"],
            cp_health_port=raw["cp_health_port"],
            host_proxy_port=raw["host_proxy_port"] if flags & Flag.HOST_PROXY else 0,
            learn=bool(flags & Flag.LEARN),
            ipv6=bool(flags & Flag.IPV6),
            quarantined=bool(flags & Flag.QUARANTINE),
            bypass_until_ns=raw["bypass_until_ns"],
        )


@dataclass(frozen=True, slots=True)
class NameRow:
    """One learnt address of an agent: 16 bytes, the name's identity, life on CLOCK_MONOTONIC."""

    addr: bytes
    identity: int
    expires_ns: int


class NameRowLike(Protocol):
    """What `Manager.update_dns` reads of a row: `NameRow`, or the gate's own."""

    @property
    def addr(self) -> bytes: ...
    @property
    def identity(self) -> int: ...
    @property
    def expires_ns(self) -> int: ...


def mapped(address: str) -> bytes:
    """
    An address as the kernel maps have it: 16 bytes, IPv4 in its mapped form.
    """
    parsed = ipaddress.ip_address(address)
    if parsed.version == 4:
        return b"\0" * 10 + b"\xff\xff" + parsed.packed
    return parsed.packed


def unmapped(packed: bytes) -> str:
    """
    The text of a 16-byte address, IPv4 unmapped.
    """
    parsed = ipaddress.IPv6Address(packed)
    return str(parsed.ipv4_mapped or parsed)


def mapped_prefix(network: IPNetwork) -> tuple[bytes, int]:
    """
    Address and prefix length of a network in the 16-byte form.
    """
    return mapped(str(network.network_address)), network.prefixlen + (96 if network.version == 4 else 0)
