"""
What a rule's `dst` is: an exact name, a name with its subtree, an address, or a CIDR.

Owns the grammar of contract 7.3 point 1. Does not resolve anything and knows no rule.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache

from clawker_cp.firewall.plan import IPNetwork

MAX_NAME = 253
MAX_LABEL = 63

_NAME = re.compile(r"[a-z0-9_.-]+")


class Kind(enum.Enum):
    """The three ways a destination is enforced (contract 7.8)."""

    NAME = "name"
    ADDRESS = "address"
    CIDR = "cidr"


class DestinationError(ValueError):
    """The text is no destination; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Destination:
    """
    A parsed `dst`.

    Names: `base` without dots at its ends, `wildcard` for a leading dot. Addresses and CIDRs:
    `network` (host bits cleared, a v4-mapped IPv6 one as the IPv4 it maps), `base` its text.
    """

    kind: Kind
    base: str
    wildcard: bool = False
    network: IPNetwork | None = None

    @property
    def labels(self) -> int:
        """Number of labels of a name's base."""
        return self.base.count(".") + 1


def _unmapped(network: IPNetwork) -> IPNetwork:
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def _as_network(text: str) -> IPNetwork | None:
    if "%" in text:  # a zone index is meaningless for a destination
        return None
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise DestinationError(f"is longer than {MAX_NAME} characters")
    if name != name.lower() and _NAME.fullmatch(name.lower()):
        raise DestinationError("has upper-case letters, write it in lower case")
    if _NAME.fullmatch(name) is None:
        raise DestinationError("has characters other than a-z 0-9 - _ .")
    for label in name.split("."):
        if not label:
            raise DestinationError("has an empty label (two dots in a row)")
        if len(label) > MAX_LABEL:
            raise DestinationError(f"has a label longer than {MAX_LABEL} characters")
        if label.startswith("-") or label.endswith("-"):
            raise DestinationError(f'has the label "{label}", which begins or ends with "-"')
    if name.replace(".", "").isdigit():
        raise DestinationError("has only digits and is no IPv4 address")


@lru_cache(maxsize=65536)
def parse_destination(dst: str) -> Destination:
    """
    Parse a `dst`.

    Raises `DestinationError` naming the first thing wrong with it. Never raises anything else.
    """
    if not dst.strip():
        raise DestinationError("is empty")
    wildcard = dst.startswith(".")
    base = dst[1:] if wildcard else dst
    if base.endswith("."):
        base = base[:-1]
    if not base:
        raise DestinationError("has nothing but dots")
    network = _as_network(base)
    if network is not None:
        if wildcard:
            raise DestinationError("is an address, which cannot begin with a dot")
        network = _unmapped(network)
        if "/" in base:
            return Destination(Kind.CIDR, str(network), network=network)
        return Destination(Kind.ADDRESS, str(network.network_address), network=network)
    _check_name(base)
    return Destination(Kind.NAME, base, wildcard)


def stored_destination(dst: str) -> str:
    """Return `dst` as it is stored: as entered, without one trailing dot."""
    return dst[:-1] if dst.endswith(".") and len(dst) > 1 else dst
