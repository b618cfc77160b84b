"""
Which addresses may stand in an answer (contract 8.3, R12). Pure; the gate asks once per answer it keeps.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MAPPED = bytes(10) + b"\xff\xff"
_COMPATIBLE = bytes(12)
_NAT64 = bytes.fromhex("0064ff9b0000000000000000")
_NAT64_LOCAL = bytes.fromhex("0064ff9b0001")
_6TO4 = bytes.fromhex("2002")
_TEREDO = bytes.fromhex("20010000")


def _networks(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# Never a destination of an agent, whatever a rule says: "this network", loopback, link-local,
# multicast, broadcast with the rest of class E, and IPv6's forms of them (site-local is dead but routed by some).
_NEVER = _networks(
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/128",
    "::1/128",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
)
_PRIVATE = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")


class AddressFilter:
    """Judge addresses of answers; `reserved` are the agents' subnet, host interfaces and contract 1.3."""

    def __init__(self, reserved: Iterable[IPNetwork] = ()) -> None:
        self._never = _ranges((*_NEVER, *reserved))
        self._private = _ranges(_PRIVATE)

    def admits(self, packed: bytes, *, private: bool) -> bool:
        """
        Whether an address of 4 or 16 octets may be answered; `private` lets private ranges through.

        IPv6 forms that carry an IPv4 address have to be admissible both as they stand and as
        the address they carry.
        """
        return all(
            not _within(form, self._never) and (private or not _within(form, self._private)) for form in _forms(packed)
        )


Ranges = dict[int, tuple[tuple[int, int], ...]]


def _ranges(networks: Iterable[IPNetwork]) -> Ranges:
    """Sort into (first, last) per address length; a reserved mapped network also counts as what it maps."""
    found: dict[int, list[tuple[int, int]]] = {4: [], 16: []}
    for network in networks:
        first, last = int(network.network_address), int(network.broadcast_address)
        found[network.max_prefixlen // 8].append((first, last))
    return {length: tuple(pairs) for length, pairs in found.items()}


def _within(packed: bytes, ranges: Ranges) -> bool:
    value = int.from_bytes(packed, "big")
    return any(first <= value <= last for first, last in ranges[len(packed)])


def _forms(packed: bytes) -> Iterator[bytes]:
    """Yield the address and every IPv4 address it may end up as."""
    yield packed
    if len(packed) == 4:
        return
    if packed[:12] in (MAPPED, _NAT64) or (packed[:12] == _COMPATIBLE and packed[12:] > bytes((0, 0, 0, 1))):
        yield packed[12:]
    elif packed[:6] == _NAT64_LOCAL:
        # RFC 8215 leaves the prefix length to the operator: every place of RFC 6052 below /48 counts.
        yield packed[6:8] + packed[9:11]
        yield packed[7:8] + packed[9:12]
        yield packed[9:13]
        yield packed[12:]
    elif packed[:2] == _6TO4:
        yield packed[2:6]
    elif packed[:4] == _TEREDO:
        yield bytes(octet ^ 0xFF for octet in packed[12:])


def kernel_form(packed: bytes) -> bytes:
    """Return the 16 octets the kernel keys an address by: IPv4 mapped into IPv6."""
    return packed if len(packed) == 16 else MAPPED + packed
