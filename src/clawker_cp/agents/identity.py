"""
Who calls on the agents' listener: the kernel's address first, then the engine's record, then the certificate (I9).

A later source is only ever compared with an earlier one. Plain values in, an identity or a refusal out; every
refusal looks the same to the caller, and its event is for the log.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from clawker_cp.agents.directory import Named, full_name
from clawker_cp.errors import ClawkerError, Denied

AGENT_CN = "clawker-clawkerd"
AGENT_URI = "urn:clawker:agent:"
CONTAINER_URI = "urn:clawker:container:"
REJECTED = "registration rejected"


class Resolver(Protocol):
    """The engine's record of running agents by their address on the agents' network."""

    async def running_at(self, address: str) -> Sequence[Named]:
        """Every running agent that has the address. Raises `ClawkerError` when it cannot be known."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """
    What TLS attests: the leaf's common name, its URIs in order, hex SHA-256 of its DER, and the peer's address.
    """

    common_name: str
    uris: tuple[str, ...]
    thumbprint: str
    address: str


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller that is who its address says it is."""

    container_id: str
    project: str
    agent: str


class Rejected(Denied):
    """Refused; `event` names the check that failed, `facts` go to the log with it."""

    def __init__(self, event: str, **facts: str) -> None:
        super().__init__(REJECTED)
        self.event = event
        self.facts = facts


async def identify(caller: Caller, resolver: Resolver) -> Identity:
    """
    Judge a caller by the checks of contract 5.2, in their order. Raises `Rejected`.
    """
    address = plain_address(caller.address)
    if not same(caller.common_name, AGENT_CN):
        raise Rejected("agent_identity_cn_mismatch", address=address)
    named = read_uri(caller.uris, AGENT_URI)
    if named is None:
        raise Rejected("agent_identity_no_agent_san", address=address)
    if not named:
        raise Rejected("agent_identity_malformed_agent_san", address=address)
    try:
        found = await resolver.running_at(address)
    except ClawkerError as error:
        raise Rejected("agent_identity_peer_lookup_error", address=address, cause=error.message) from error
    if not found:
        raise Rejected("agent_identity_peer_lookup_no_match", address=address)
    if len(found) > 1:
        raise Rejected("agent_identity_ambiguous_peer_ip", address=address, count=str(len(found)))
    record = found[0]
    if not record.agent:
        raise Rejected("agent_identity_invalid_labels", address=address, container_id=record.id[:12])
    if not same(named, full_name(record.project, record.agent)):
        raise Rejected("agent_identity_san_label_mismatch", address=address, container_id=record.id[:12])
    return Identity(record.id, record.project, record.agent)


def plain_address(text: str) -> str:
    """
    An address as the engine writes it: v4-mapped ones unmapped. Raises `Rejected` for what is none.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise Rejected("agent_identity_peer_auth_missing") from None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def read_uri(uris: Sequence[str], prefix: str) -> str | None:
    """
    What follows the prefix in the first URI that has it: None = missing, "" = malformed (contract 4.1).
    """
    return next((uri.removeprefix(prefix) for uri in uris if uri.startswith(prefix)), None)


def same(given: str, wanted: str) -> bool:
    """
    Whether two texts are equal, in constant time.
    """
    return hmac.compare_digest(given.encode(), wanted.encode())
